// Draws tokens: one of each row of logits.
#include <algorithm>
#include <numeric>

#include "view.h"

using namespace dc;

namespace {

struct Truncation {
  int64_t top_k;
  double temperature, top_p;
  float min_p;
};

struct Drawn {
  int32_t token;
  float logprob;
};

// Logits of a row that are summed at once.
constexpr int64_t kPart = 512;

class Sampler {
 public:
  Sampler(const Truncation& how, bool logprob) : how_(how), logprob_(logprob) {}

  Drawn draw(const float* x, int64_t n, double u) {
    const auto& kernels = element_kernels();
    const float top = kernels.max(x, n);
    bool odd = !(top > -INFINITY);  // and NaN, of which the maximum knows nothing, and infinity
    for (int64_t i = 0; i < n; i++) odd |= !(x[i] <= std::min(top, std::numeric_limits<float>::max()));
    if (odd) return {-1, NAN};
    const int64_t token = how_.temperature == 0 ? std::find(x, x + n, top) - x : among(x, n, top, u);
    if (!logprob_) return {int32_t(token), 0};
    const double sum = how_.temperature == 1 && how_.min_p == 0 ? total_ : exponentials(x, n, top, 1);
    return {int32_t(token), float(double(x[token]) - top - std::log(sum))};
  }

 private:
  // e_ = e^((x - top) / temperature), parts_: their sums; returns the sum of all.
  double exponentials(const float* x, int64_t n, float top, double temperature) {
    e_.resize(size_t(n));
    parts_.resize(size_t((n + kPart - 1) / kPart));
    for (int64_t i = 0; i < n; i++) e_[size_t(i)] = x[i] - top;
    for (size_t p = 0; p < parts_.size(); p++) {
      const int64_t from = int64_t(p) * kPart;
      parts_[p] = element_kernels().exp_sum(e_.data() + from, float(1 / temperature), 0, std::min(kPart, n - from));
    }
    return std::accumulate(parts_.begin(), parts_.end(), 0.0);
  }

  int64_t among(const float* x, int64_t n, float top, double u) {
    total_ = exponentials(x, n, top, how_.temperature);
    if (how_.min_p > 0) {
      for (float& e : e_) e = e < how_.min_p ? 0 : e;
      for (size_t p = 0; p < parts_.size(); p++)
        parts_[p] = element_kernels().sum(e_.data() + int64_t(p) * kPart, std::min(kPart, n - int64_t(p) * kPart));
    }
    if ((how_.top_k > 0 && how_.top_k < n) || how_.top_p < 1) return among_kept(x, n, u);
    double left = u * std::accumulate(parts_.begin(), parts_.end(), 0.0);
    size_t p = 0;
    while (p + 1 < parts_.size() && left >= parts_[p]) left -= parts_[p++];
    int64_t last = -1;
    for (int64_t i = int64_t(p) * kPart; i < n; i++) {
      if (e_[size_t(i)] == 0) continue;
      last = i;
      left -= e_[size_t(i)];
      if (left < 0) return i;
    }
    // Rounding: the end of the row, where only zeros stand behind the last.
    while (last < 0) last = e_[--n] > 0 ? n : -1;
    return last;
  }

  int64_t among_kept(const float* x, int64_t n, double u) {
    ids_.resize(size_t(n));
    std::iota(ids_.begin(), ids_.end(), 0);
    const auto before = [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    const auto begin = ids_.begin();
    const auto sum_of = [&](int64_t count) {
      double sum = 0;
      for (int64_t i = 0; i < count; i++) sum += e_[size_t(ids_[size_t(i)])];
      return sum;
    };
    int64_t kept = how_.top_k > 0 ? std::min(how_.top_k, n) : n;
    if (kept < n) std::nth_element(begin, begin + kept, ids_.end(), before);
    if (how_.top_p < 1) {
      // Mostly a few reach the sum: only as many as that are sorted.
      const double goal = how_.top_p * sum_of(kept);
      double sum = 0;
      int64_t count = 0;
      for (int64_t sorted = 0; count == sorted && sorted < kept;) {
        const int64_t more = std::min(kept, std::max<int64_t>(64, 8 * sorted));
        std::partial_sort(begin + sorted, begin + more, begin + kept, before);
        sorted = more;
        while (count < sorted && (count == 0 || sum < goal)) sum += e_[size_t(ids_[size_t(count++)])];
        if (sum >= goal) break;
      }
      kept = count;
    }
    std::sort(begin, begin + kept);
    double left = u * sum_of(kept);
    int64_t last = ids_[0];
    for (int64_t i = 0; i < kept; i++) {
      const int32_t id = ids_[size_t(i)];
      if (e_[size_t(id)] == 0) continue;
      last = id;
      left -= e_[size_t(id)];
      if (left < 0) break;
    }
    return last;
  }

  const Truncation how_;
  const bool logprob_;
  double total_ = 0;
  std::vector<float> e_;
  std::vector<double> parts_;
  std::vector<int32_t> ids_;
};

}  // namespace

extern "C" int dc_cpu_sample(dc_context* c, const dc_call* call) {
  const dc_tensor &tokens = call->t[0], &logits = call->t[1], &u = call->t[2], &logprob = call->t[3];
  const Truncation how{call->i[0], call->f[0], call->f[1], float(call->f[2])};
  const int64_t n = logits.dim[1];
  parallel_for(c, logits.dim[0], row_grain(n * 8), [&](int64_t begin, int64_t end) {
    Sampler sampler(how, present(logprob));
    RowReader reader;
    for (int64_t r = begin; r < end; r++) {
      const float* x = reader.row(logits, r * logits.stride[0], logits.stride[1], n);
      const Drawn drawn = sampler.draw(x, n, data<double>(u)[r * u.stride[0]]);
      data<int32_t>(tokens)[r * tokens.stride[0]] = drawn.token;
      if (present(logprob)) data<float>(logprob)[r * logprob.stride[0]] = drawn.logprob;
    }
  });
  return 0;
}
