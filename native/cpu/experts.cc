// Mixture of experts: routing, the order of rows by expert, and the way back.
#include <algorithm>

#include "view.h"

using namespace dc;

extern "C" int dc_cpu_route(dc_context* c, const dc_call* call) {
  const dc_tensor &w = call->t[0], &idx = call->t[1], &logits = call->t[2], &bias = call->t[3];
  const int scoring = int(call->i[0]);
  const int64_t T = logits.dim[0], E = logits.dim[1], K = idx.dim[1];
  const int64_t groups = std::max<int64_t>(1, call->i[1]), per_group = E / groups;
  const int64_t top_groups = groups > 1 ? call->i[2] : 1;
  const bool best_two = call->i[3] == 1, normalize = call->i[4] != 0;
  if (E % groups != 0) return fail(c, "%ld experts in %ld groups", long(E), long(groups));
  if (top_groups < 1 || top_groups > groups || K > top_groups * per_group)
    return fail(c, "%ld of %ld experts in the best %ld of %ld groups", long(K), long(E), long(top_groups), long(groups));
  std::vector<float> shift(size_t(E), 0.0f);
  if (present(bias)) load_strided(shift.data(), bias, 0, bias.stride[0], E);
  parallel_for(c, T, row_grain(E * 8), [&](int64_t begin, int64_t end) {
    std::vector<float> score(static_cast<size_t>(E)), choice(static_cast<size_t>(E)), group(static_cast<size_t>(groups));
    std::vector<int32_t> order;
    const auto& kernels = element_kernels();
    // Greater first, ties to the lower index; NaN counts as the lowest, so that an index is always valid.
    auto better = [](const std::vector<float>& x) {
      return [&x](int32_t i, int32_t j) {
        const float a = x[size_t(i)], b = x[size_t(j)];
        return a > b || (a == b && i < j);
      };
    };
    auto best = [&](const std::vector<float>& x, int64_t n) {
      order.resize(x.size());
      for (size_t i = 0; i < x.size(); i++) order[i] = int32_t(i);
      std::partial_sort(order.begin(), order.begin() + n, order.end(), better(x));
    };
    for (int64_t t = begin; t < end; t++) {
      load_strided(score.data(), logits, t * logits.stride[0], logits.stride[1], E);
      if (scoring == 0) {
        const double sum = kernels.exp_sum(score.data(), 1, kernels.max(score.data(), E), E);
        kernels.scale(score.data(), float(1 / sum), E);
      } else {
        kernels.unary(score.data(), E, scoring == 1 ? DC_SIGMOID : DC_SOFTPLUS, 0, 0);
        if (scoring == 2) kernels.unary(score.data(), E, DC_SQRT, 0, 0);
      }
      for (size_t e = 0; e < size_t(E); e++) {
        choice[e] = score[e] + shift[e];
        if (std::isnan(choice[e])) choice[e] = -INFINITY;
      }
      if (groups > 1) {
        for (int64_t g = 0; g < groups; g++) {
          float first = -INFINITY, second = -INFINITY;
          for (int64_t e = g * per_group; e < (g + 1) * per_group; e++) {
            const float x = choice[size_t(e)];
            if (x > first) {
              second = first;
              first = x;
            } else if (x > second) {
              second = x;
            }
          }
          group[size_t(g)] = best_two && per_group > 1 ? first + second : first;
        }
        best(group, top_groups);
        std::vector<char> open(static_cast<size_t>(groups), 0);
        for (int64_t g = 0; g < top_groups; g++) open[size_t(order[size_t(g)])] = 1;
        order.clear();
        for (int64_t e = 0; e < E; e++)
          if (open[size_t(e / per_group)]) order.push_back(int32_t(e));
        std::partial_sort(order.begin(), order.begin() + K, order.end(), better(choice));
      } else {
        best(choice, K);
      }
      double sum = 0;
      for (int64_t j = 0; j < K; j++) sum += score[size_t(order[size_t(j)])];
      const double factor = (normalize ? 1 / (sum + 1e-20) : 1) * call->f[0];
      for (int64_t j = 0; j < K; j++) {
        data<int32_t>(idx)[t * idx.stride[0] + j * idx.stride[1]] = order[size_t(j)];
        data<float>(w)[t * w.stride[0] + j * w.stride[1]] = float(double(score[size_t(order[size_t(j)])]) * factor);
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_expert_sort(dc_context* c, const dc_call* call) {
  const dc_tensor &slots = call->t[0], &tokens = call->t[1], &offsets = call->t[2], &place = call->t[3], &idx = call->t[4];
  const int64_t T = idx.dim[0], K = idx.dim[1], E = offsets.dim[0] - 1;
  std::vector<int32_t> next(size_t(E) + 1, 0);
  auto expert = [&](int64_t t, int64_t j) { return data<int32_t>(idx)[t * idx.stride[0] + j * idx.stride[1]]; };
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < K; j++) {
      if (expert(t, j) < 0 || expert(t, j) >= E)
        return fail(c, "idx[%ld, %ld] = %d of %ld experts", long(t), long(j), expert(t, j), long(E));
      next[size_t(expert(t, j)) + 1]++;
    }
  for (int64_t e = 0; e <= E; e++) {
    if (e > 0) next[size_t(e)] += next[size_t(e) - 1];
    data<int32_t>(offsets)[e * offsets.stride[0]] = next[size_t(e)];
  }
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < K; j++) {
      const int32_t at = next[size_t(expert(t, j))]++;
      data<int32_t>(slots)[at * slots.stride[0]] = int32_t(t * K + j);
      data<int32_t>(tokens)[at * tokens.stride[0]] = int32_t(t);
      data<int32_t>(place)[t * place.stride[0] + j * place.stride[1]] = at;
    }
  return 0;
}

extern "C" int dc_cpu_expert_combine(dc_context* c, const dc_call* call) {
  const dc_tensor &out = call->t[0], &y = call->t[1], &place = call->t[2], &w = call->t[3], &base = call->t[4];
  const int64_t T = out.dim[0], width = out.dim[1], K = place.dim[1];
  const Places row_of{place};
  if (row_of.check(c, y.dim[0])) return 1;
  parallel_for(c, T, row_grain(width * K), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(static_cast<size_t>(width));
    RowReader reader;
    for (int64_t t = begin; t < end; t++) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t j = 0; j < K; j++) {
        float weight;
        load_strided(&weight, w, t * w.stride[0] + j * w.stride[1], 1, 1);
        element_kernels().axpy(sum.data(), weight, reader.row(y, row_of(t, j) * y.stride[0], y.stride[1], width), width);
      }
      if (present(base))
        element_kernels().axpy(sum.data(), 1, reader.row(base, t * base.stride[0], base.stride[1], width), width);
      store_strided(out, t * out.stride[0], out.stride[1], sum.data(), width);
    }
  });
  return 0;
}
