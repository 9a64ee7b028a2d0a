// Balanced assignment of items to places. It runs on the host, one item after another, beside whatever a device does.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace dc {

// An auction with epsilon-scaling in which the seats of one place are alike (Bertsekas & Castanon 1989). A place costs what
// the most modest of those in it would pay, once it is full; so prices only rise. From one round to the next, finer, one,
// items stay where they are content. Items look at places in fp32, at scores less the largest of their row.
class Auction {
 public:
  // scores [items, places], rows without gaps.
  Auction(std::vector<float> scores, const std::vector<int32_t>& capacities)
      : places_(int(capacities.size())), items_(int64_t(scores.size()) / places_), scores_(std::move(scores)), price_(size_t(places_)),
        shown_(size_t(places_)), rival_(size_t(items_)), place_(size_t(items_), -1), waiting_(size_t(items_)), seats_(size_t(places_)) {
    for (size_t e = 0; e < seats_.size(); e++) {
      seats_[e].size = capacities[e];
      seats_[e].bid.resize(size_t(capacities[e]));
      seats_[e].item.resize(size_t(capacities[e]));
    }
  }

  // Until nobody would gain more than epsilon deviations of the scores by another place; `prices` [places] in and out.
  // False: scores that are not finite.
  bool run(double epsilon, double* prices) {
    double sums[LANES] = {}, squares[LANES] = {};
    const size_t count = scores_.size(), whole = count / LANES * LANES;
    auto add = [&](size_t lane, double v) { sums[lane] += v, squares[lane] += v * v; };
    for (size_t i = 0; i < whole; i += LANES)
      for (size_t l = 0; l < LANES; l++) add(l, scores_[i + l]);
    for (size_t i = whole; i < count; i++) add(i - whole, scores_[i]);
    double sum = 0, square = 0;
    for (size_t l = 0; l < LANES; l++) sum += sums[l], square += squares[l];
    if (!std::isfinite(square)) return false;
    const double n = std::max(1.0, double(count)), mean = sum / n;
    const double deviation = std::sqrt(std::max(square / n - mean * mean, 0.0)), spread = deviation > 0 ? deviation : 1;
    for (int64_t i = 0; i < items_; i++) {
      float* row = scores_.data() + i * places_;
      const float top = largest(row, places_);
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

  static float largest(const float* row, int n) {
    float best[LANES];
    std::fill(best, best + LANES, -INFINITY);
    const int whole = n / LANES * LANES;
    for (int e = 0; e < whole; e += LANES)
      for (int l = 0; l < LANES; l++) best[l] = row[e + l] > best[l] ? row[e + l] : best[l];
    for (int e = whole; e < n; e++) best[0] = std::max(best[0], row[e]);
    return *std::max_element(best, best + LANES);
  }

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

  const int places_;
  const int64_t items_;
  std::vector<float> scores_;
  std::vector<double> price_;
  std::vector<float> shown_, rival_;  // prices as they are looked at; what the best other place was worth at the last look
  std::vector<int32_t> place_, waiting_;
  std::vector<Seats> seats_;
};

// Places of items such that the sum of scores [items, places] is within items epsilon deviations of the scores of the most
// there is, where place e takes capacities[e] items, in all as many as there are; scores are finite. prices: what places
// cost, from an assignment of like scores (zeros: from none), in and out. NULL, or what is wrong.
inline const char* assign_balanced(std::vector<float> scores, const std::vector<int32_t>& capacities, double epsilon, std::vector<int32_t>* places,
                                   std::vector<double>* prices) {
  uint64_t seats = 0;
  for (const int32_t size : capacities) {
    if (size < 0) return "a place has less than no room";
    seats += uint64_t(size);
  }
  if (seats * capacities.size() != scores.size()) return "the places do not take as many items as there are";
  if (!(epsilon > 0)) return "epsilon must be positive";
  places->clear();
  if (scores.empty()) return nullptr;
  Auction auction(std::move(scores), capacities);
  if (!auction.run(epsilon, prices->data())) return "scores that are not finite";
  *places = auction.places();
  return nullptr;
}

}  // namespace dc
