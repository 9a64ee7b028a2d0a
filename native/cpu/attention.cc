// Attention: forward.
#include <algorithm>

#include "view.h"

using namespace dc;

namespace {

// Which keys a query sees: [first, last).
struct Mask {
  bool causal;
  int64_t window, offset;
  void keys(int64_t s, int64_t length, int64_t* first, int64_t* last) const {
    *last = causal ? std::min(length, s + offset + 1) : length;
    *first = window > 0 ? std::max<int64_t>(0, s + offset - window + 1) : 0;
    *last = std::max(*last, int64_t(0));
    *first = std::min(*first, *last);
  }
};

int64_t length_of(const dc_tensor& lengths, int64_t b, int64_t most) {
  return present(lengths) ? std::min<int64_t>(most, std::max(0, data<int32_t>(lengths)[b * lengths.stride[0]])) : most;
}

}  // namespace

extern "C" int dc_cpu_attention(dc_context* c, const dc_call* call) {
  const dc_tensor &o = call->t[0], &q = call->t[1], &k = call->t[2], &v = call->t[3], &lengths = call->t[4],
                  &sinks = call->t[5], &lse = call->t[6];
  const Mask mask{call->i[0] != 0, call->i[1], call->i[2]};
  const float scale = float(call->f[0]), cap = float(call->f[1]);
  const int64_t B = q.dim[0], S = q.dim[1], H = q.dim[2], D = q.dim[3], T = k.dim[1], G = H / k.dim[2], Dv = v.dim[3];
  if (count(o) == 0) return 0;
  const auto& kernels = element_kernels();
  parallel_for(c, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys(size_t(T * D)), values(size_t(T * Dv)), query(static_cast<size_t>(D)), scores(static_cast<size_t>(T)), sum(static_cast<size_t>(Dv));
    for (int64_t w = begin; w < end; w++) {
      const int64_t b = w / H, h = w % H, g = h / G, length = length_of(lengths, b, T);
      for (int64_t t = 0; t < length; t++) {
        load_strided(&keys[size_t(t * D)], k, b * k.stride[0] + t * k.stride[1] + g * k.stride[2], k.stride[3], D);
        load_strided(&values[size_t(t * Dv)], v, b * v.stride[0] + t * v.stride[1] + g * v.stride[2], v.stride[3], Dv);
      }
      for (int64_t s = 0; s < S; s++) {
        int64_t first, last;
        mask.keys(s, length, &first, &last);
        load_strided(query.data(), q, b * q.stride[0] + s * q.stride[1] + h * q.stride[2], q.stride[3], D);
        float* x = scores.data();
        for (int64_t t = first; t < last; t++) x[t] = scale * kernels.dot(query.data(), &keys[size_t(t * D)], D);
        if (cap > 0) kernels.unary(x + first, last - first, DC_SOFTCAP, cap, 0);
        float most = kernels.max(x + first, last - first);
        const float sink = present(sinks) ? data<float>(sinks)[h * sinks.stride[0]] : -INFINITY;
        most = std::max(most, sink);
        std::fill(sum.begin(), sum.end(), 0.0f);
        double total = 0;
        if (most > -INFINITY) {
          total = kernels.exp_sum(x + first, 1, most, last - first) + std::exp(double(sink) - most);
          for (int64_t t = first; t < last; t++) kernels.axpy(sum.data(), x[t], &values[size_t(t * Dv)], Dv);
          kernels.scale(sum.data(), float(1 / total), Dv);
        }
        store_strided(o, b * o.stride[0] + s * o.stride[1] + h * o.stride[2], o.stride[3], sum.data(), Dv);
        if (present(lse))
          data<float>(lse)[b * lse.stride[0] + h * lse.stride[1] + s * lse.stride[2]] =
              total > 0 ? float(double(most) + std::log(total)) : -INFINITY;
      }
    }
  });
  return 0;
}
