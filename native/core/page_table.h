// The pages of one KV head of one layer, and which of them changed since a backend last looked.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace innerkv {

struct Page;

/// Pages in the order of their tokens; an entry is null when all its tokens were removed.
///
/// A backend may keep a copy of what attention reads of each entry: the addresses of the page and of its
/// extents, and its `removed` bits. Whatever changes one of these notes it here. A page changes only while
/// one table alone shows it (copy on write), so one note is enough.
class PageTable {
 public:
  using Entry = std::shared_ptr<Page>;

  PageTable() = default;
  /// The same pages in a table that no backend has seen.
  PageTable(const PageTable& other) : entries_(other.entries_) {}
  PageTable& operator=(const PageTable& other) {
    entries_ = other.entries_;
    mirror.reset();
    all_stale_ = true;
    return *this;
  }

  std::size_t size() const { return entries_.size(); }
  const Entry& operator[](std::size_t i) const { return entries_[i]; }
  const Entry& back() const { return entries_.back(); }
  const Entry* data() const { return entries_.data(); }
  auto begin() const { return entries_.begin(); }
  auto end() const { return entries_.end(); }

  /// push_back() takes no memory up to so many entries.
  void reserve(std::size_t entries) { entries_.reserve(entries); }
  void push_back(Entry page) {
    entries_.push_back(std::move(page));
    changed(entries_.size() - 1);
  }
  void set(std::size_t i, Entry page) noexcept {
    if (page != entries_[i]) changed(i);
    entries_[i] = std::move(page);
  }
  /// Extents or `removed` bits of page i did.
  void changed(std::size_t i) noexcept {
    const int entry = static_cast<int>(i);
    const std::span<const int> noted = stale();
    if (all_stale_ || std::find(noted.begin(), noted.end(), entry) != noted.end()) return;
    if (stale_count_ == stale_.size())
      all_stale_ = true;
    else
      stale_[stale_count_++] = entry;
  }
  /// Keeps the first `count` entries, of at least as many.
  void truncate(std::size_t count) noexcept {
    entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(count), entries_.end());
    const auto kept = std::remove_if(stale_.begin(), stale_.begin() + stale_count_,
                                     [&](int i) { return static_cast<std::size_t>(i) >= count; });
    stale_count_ = static_cast<std::size_t>(kept - stale_.begin());
  }

  // For backends, which see tables as const.

  /// The backend's own; a table begins without one. It must not hold pages.
  mutable std::shared_ptr<void> mirror;
  /// Any entry may differ from what it was at the last told().
  bool all_stale() const { return all_stale_; }
  /// Unless all are stale: the entries that may differ, each once, all of them below size().
  std::span<const int> stale() const { return {stale_.data(), stale_count_}; }
  /// The backend's copy shows every entry as it is.
  void told() const noexcept {
    all_stale_ = false;
    stale_count_ = 0;
  }

 private:
  std::vector<Entry> entries_;
  mutable bool all_stale_ = true;
  mutable std::size_t stale_count_ = 0;
  mutable std::array<int, 16> stale_{};  // more at once are rare, and then all are told
};

}  // namespace innerkv
