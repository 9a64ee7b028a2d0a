// Where the queue threads of several devices meet for a collective operation: the last to come does it for all.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"

class Meeting {
 public:
  Meeting(const dc_backend* backend, dc_group* group, int ranks) : backend_(backend), group_(group), guests_(size_t(ranks)) {}
  ~Meeting() { close(); }

  // Blocks until every rank is here and the operation is enqueued on all (a CPU's: done). Gives "", or why it was not,
  // to all ranks alike. `failed`: what went wrong on this rank before; its memory may hold anything.
  std::string meet(int rank, int kind, const std::vector<dc_tensor>& x, const std::string& failed) {
    std::unique_lock lock(mutex_);
    if (!group_) return "a device of the group was closed";
    guests_[size_t(rank)] = {kind, &x};
    if (outcome_.empty() && !failed.empty()) outcome_ = "rank " + std::to_string(rank) + " failed: " + failed;
    const uint64_t round = round_;
    if (++here_ < guests_.size()) {
      wake_.wait(lock, [&] { return !group_ || round_ != round; });
      return round_ != round ? last_ : "a device of the group was closed";
    }
    if (outcome_.empty()) outcome_ = together();
    last_.swap(outcome_);  // whoever reads it comes before the next round ends: that needs him
    outcome_.clear();
    here_ = 0;
    round_++;
    wake_.notify_all();
    return last_;
  }

  // Nobody waits any longer, and the group is no more. Before the first of its devices closes.
  void close() {
    std::lock_guard lock(mutex_);
    if (group_) backend_->part(group_);
    group_ = nullptr;
    wake_.notify_all();
  }

 private:
  struct Guest {
    int kind;
    const std::vector<dc_tensor>* x;
  };
  const dc_backend* backend_;
  dc_group* group_;  // NULL: closed
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Guest> guests_;
  size_t here_ = 0;
  uint64_t round_ = 0;
  std::string outcome_, last_;  // of the round that gathers, and of the one before

  std::string together() {
    const Guest& first = guests_[0];
    std::vector<const dc_tensor*> x;
    for (const Guest& guest : guests_) {
      bool same = guest.kind == first.kind && guest.x->size() == first.x->size();
      for (size_t i = 0; same && i < guest.x->size(); i++)
        same = (*guest.x)[i].dim[0] == (*first.x)[i].dim[0] && (*guest.x)[i].dtype == (*first.x)[i].dtype;
      if (!same) return "ranks came with different operations";
      x.push_back(guest.x->data());
    }
    char error[1024] = "unknown reason";
    return backend_->collective(group_, first.kind, x.data(), int(first.x->size()), error, sizeof error) ? error : "";
  }
};
