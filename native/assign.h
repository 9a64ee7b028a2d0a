// The balanced assignment of both backends: it runs on the host, one item after another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dc {

// An auction with epsilon-scaling in which the seats of one place are alike (Bertsekas & Castanon 1989). A place costs what
// the most modest of those in it would pay, once it is full; so prices only rise. From one round to the next, finer, one,
// items stay where they are content. Items look at places in fp32, at scores less the largest of their row.
class Auction {
 public:
  // scores [items, places], rows without gaps.
  Auction(const float* scores, int64_t items, int places, const int32_t* capacities)
      : items_(items), places_(places), scores_(scores, scores + items * places), price_(size_t(places)), shown_(size_t(places)),
        rival_(size_t(items)), place_(size_t(items), -1), waiting_(size_t(items)), seats_(size_t(places)) {
    for (int e = 0; e < places; e++) {
      seats_[size_t(e)].size = capacities[e];
      seats_[size_t(e)].bid.resize(size_t(capacities[e]));
      seats_[size_t(e)].item.resize(size_t(capacities[e]));
    }
  }

  // Until nobody would gain more than epsilon deviations of the scores by another place; `prices` [places] in and out.
  // False: scores that are not finite.
  bool run(double epsilon, double* prices) {
    double sum = 0, squares = 0;
    for (const float v : scores_) sum += v, squares += double(v) * v;
    if (!std::isfinite(squares)) return false;
    const double n = std::max(1.0, double(items_) * places_), mean = sum / n;
    const double deviation = std::sqrt(std::max(squares / n - mean * mean, 0.0)), spread = deviation > 0 ? deviation : 1;
    for (int64_t i = 0; i < items_; i++) {
      float* row = scores_.data() + i * places_;
      const float top = *std::max_element(row, row + places_);
      for (int e = 0; e < places_; e++) row[e] -= top;
    }
    double low = INFINITY, high = -INFINITY;
    bool warm = false;
    for (int e = 0; e < places_; e++) {
      warm |= prices[e] != 0;
      low = std::min(low, prices[e]), high = std::max(high, prices[e]);
      set(e, seats_[size_t(e)].size > 0 ? prices[e] : INFINITY);  // nobody wants what nobody can pay
    }
    const double last = spread * epsilon;
    // Prices that are far from right have to be overtaken step by step: the first steps are as large as they are.
    for (double step = std::max(warm ? std::max(spread, high - low) / 25 : spread, last);; step = std::max(step / 5, last)) {
      round(step);
      if (step <= last) break;
    }
    for (int e = 0; e < places_; e++)
      if (std::isfinite(price_[size_t(e)])) prices[e] = price_[size_t(e)];
    return true;
  }

  // Of each item, after `run`.
  const std::vector<int32_t>& places() const { return place_; }

 private:
  static constexpr int LANES = 16;

  // A heap of bids, the lowest on top.
  struct Seats {
    int32_t size = 0, taken = 0;
    std::vector<double> bid;
    std::vector<int32_t> item;

    void put(size_t i, double b, int32_t who) { bid[i] = b, item[i] = who; }
    void rise(double b, int32_t who) {
      size_t i = size_t(taken++);
      for (; i > 0 && bid[(i - 1) / 2] > b; i = (i - 1) / 2) put(i, bid[(i - 1) / 2], item[(i - 1) / 2]);
      put(i, b, who);
    }
    void sink(size_t i, double b, int32_t who) {
      for (size_t child = 2 * i + 1; child < size_t(taken); i = child, child = 2 * i + 1) {
        if (child + 1 < size_t(taken) && bid[child + 1] < bid[child]) child++;
        if (bid[child] >= b) break;
        put(i, bid[child], item[child]);
      }
      put(i, b, who);
    }
  };

  void set(int e, double price) { price_[size_t(e)] = price, shown_[size_t(e)] = float(price); }

  void round(double epsilon) {
    for (Seats& seats : seats_) seats.taken = 0;
    int64_t left = 0;
    for (int64_t i = items_ - 1; i >= 0; i--) {
      const int32_t own = place_[size_t(i)];
      // The highest price at which it stays. What a rival was worth when it last looked is no less than now.
      const double bid = own < 0 ? 0 : double(scores_[size_t(i * places_ + own)]) - rival_[size_t(i)] + epsilon;
      if (own >= 0 && bid >= price_[size_t(own)]) {
        Seats& seats = seats_[size_t(own)];
        seats.put(size_t(seats.taken++), bid, int32_t(i));
      } else {
        waiting_[size_t(left++)] = int32_t(i);
      }
    }
    for (Seats& seats : seats_)
      for (size_t i = size_t(seats.taken) / 2; i-- > 0;) seats.sink(i, seats.bid[i], seats.item[i]);
    while (left > 0) {
      const int32_t who = waiting_[size_t(--left)];
      const int32_t at = look(who);
      Seats& seats = seats_[size_t(at)];
      // Whatever rounding makes of it, it raises the price.
      const double bid = std::max(double(scores_[size_t(who) * size_t(places_) + size_t(at)]) - rival_[size_t(who)], price_[size_t(at)]) + epsilon;
      place_[size_t(who)] = at;
      if (seats.taken < seats.size) {
        seats.rise(bid, who);
      } else {
        waiting_[size_t(left++)] = seats.item[0];
        seats.sink(0, bid, who);
      }
      if (seats.taken == seats.size) set(at, seats.bid[0]);
    }
  }

  // The place where item i gains most; its rival is noted.
  int32_t look(int32_t i) {
    const float *row = scores_.data() + int64_t(i) * places_, *price = shown_.data();
    float best[LANES], second[LANES];
    std::fill(best, best + LANES, -INFINITY);
    std::fill(second, second + LANES, -INFINITY);
    const int whole = places_ / LANES * LANES;
    for (int e = 0; e < whole; e += LANES)
      for (int l = 0; l < LANES; l++) {
        const float value = row[e + l] - price[e + l], lesser = value < best[l] ? value : best[l];
        best[l] = value < best[l] ? best[l] : value;
        second[l] = lesser < second[l] ? second[l] : lesser;
      }
    float first = -INFINITY, rival = -INFINITY;
    auto offer = [&](float value) {
      rival = std::max(rival, std::min(first, value));
      first = std::max(first, value);
    };
    for (int l = 0; l < LANES; l++) offer(best[l]), rival = std::max(rival, second[l]);
    for (int e = whole; e < places_; e++) offer(row[e] - price[e]);
    int32_t at = 0;
    while (row[at] - price[at] != first) at++;
    // A single place has no rival: any bid wins.
    rival_[size_t(i)] = rival == -INFINITY ? first : rival;
    return at;
  }

  const int64_t items_;
  const int places_;
  std::vector<float> scores_;
  std::vector<double> price_;
  std::vector<float> shown_, rival_;  // prices as they are looked at; what the best other place was worth at the last look
  std::vector<int32_t> place_, waiting_;
  std::vector<Seats> seats_;
};

// The op: all of it in host memory. NULL, or what is wrong.
inline const char* assign_balanced(int32_t* place, double* prices, const float* scores, const int32_t* capacities, int64_t items, int places, double epsilon) {
  int64_t seats = 0;
  for (int e = 0; e < places; e++) {
    if (capacities[e] < 0) return "a place has less than no room";
    seats += capacities[e];
  }
  if (seats != items) return "the places do not take as many items as there are";
  if (!(epsilon > 0)) return "epsilon must be positive";
  if (items == 0) return nullptr;
  Auction auction(scores, items, places, capacities);
  if (!auction.run(epsilon, prices)) return "scores that are not finite";
  std::copy(auction.places().begin(), auction.places().end(), place);
  return nullptr;
}

}  // namespace dc
