// A copy of every page table that hears only what the table says has changed never differs from the table.
// INNERKV_TABLE_STEPS: random operations per scheme.
#include <algorithm>
#include <numeric>
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

/// What a device keeps of an entry.
struct Shown {
  const std::uint8_t* page = nullptr;
  std::uint64_t removed[2] = {0, 0};
  std::vector<const std::uint8_t*> k_zeros, v_zeros;
  bool operator==(const Shown&) const = default;
};

Shown shown(const PageTable::Entry& page) {
  Shown entry;
  if (!page) return entry;
  entry.page = page->bytes.data();
  std::copy_n(page->removed, 2, entry.removed);
  for (const Slot& slot : page->k_zeros) entry.k_zeros.push_back(slot.data());
  for (const Slot& slot : page->v_zeros) entry.v_zeros.push_back(slot.data());
  return entry;
}

/// A backend's copy. Like a device's it never shrinks: what is behind the end of the table stays as it was.
struct Copy {
  std::vector<Shown> entries;
};

struct Tally {
  int looks = 0, told_all = 0, told = 0;
};

/// Brings the copy up to date by what the table says, and compares.
bool catch_up(const PageTable& table, Tally& tally) {
  if (!table.mirror) {
    if (!table.all_stale()) return false;
    table.mirror = std::make_shared<Copy>();
  }
  auto& entries = static_cast<Copy*>(table.mirror.get())->entries;
  if (entries.size() < table.size()) entries.resize(table.size());
  std::vector<int> stale(table.stale().begin(), table.stale().end());
  tally.told_all += table.all_stale();
  if (table.all_stale()) {
    stale.resize(table.size());
    std::iota(stale.begin(), stale.end(), 0);
  }
  for (std::size_t i = 0; i < stale.size(); ++i) {
    if (stale[i] < 0 || at(stale[i]) >= table.size()) return false;
    if (std::find(stale.begin(), stale.begin() + static_cast<std::ptrdiff_t>(i), stale[i]) !=
        stale.begin() + static_cast<std::ptrdiff_t>(i))
      return false;
    entries[at(stale[i])] = shown(table[at(stale[i])]);
  }
  tally.told += static_cast<int>(stale.size());
  ++tally.looks;
  table.told();
  if (table.all_stale() || !table.stale().empty()) return false;
  for (std::size_t i = 0; i < table.size(); ++i)
    if (entries[i] != shown(table[i])) return false;
  return true;
}

using Sequences = std::vector<std::unique_ptr<Sequence>>;

/// One thing that happens to `sequence`, one of `all`.
void operate(const Family& family, const Tokens& tokens, Sequences& all, std::size_t which,
             check::Random& random) {
  Sequence& sequence = *all[which];
  const int length = sequence.tokens(0);
  const auto some = [&] { return random.below(4) == 0 ? 1 + random.below(200) : 1 + random.below(20); };
  const auto add = [&](Sequence& to, int count) { append(to, tokens, random.below(200), count); };
  const LayerState& state = sequence.layer_state(0);
  const int sink = state.reach.sink, stored = std::min(state.reach.k, state.reach.v);
  switch (random.below(10)) {
    case 0:
      if (all.size() < 5) all.push_back(sequence.fork());
      break;
    case 1:
      sequence.truncate(std::max(0, random.below(3) == 0 ? random.below(length + 1) : length - some()));
      break;
    case 2:
      if (family.editable() && stored > 0)
        for (int i = random.below(3); i >= 0; --i) {
          const int position = sink + random.below(stored);
          error_of([&] { sequence.replace(0, position, tokens.k.data(), tokens.v.data()); });
        }
      break;
    case 3:
      if (family.editable() && stored > 0) {
        std::vector<int> positions(at(random.below(8) == 0 ? 300 : 1 + random.below(4)));
        const int first = random.below(stored);
        for (std::size_t i = 0; i < positions.size(); ++i)
          positions[i] =
              sink + (positions.size() > 4 ? (first + static_cast<int>(i)) % stored : random.below(stored));
        sequence.remove(0, random.below(3) - 1, positions);
      }
      break;
    case 4: {
      const int added = some();
      const Checkpoint point = sequence.checkpoint(added);
      for (int done = 0; done < added && random.below(8) > 0;) {
        const int count = std::min(added - done, some());
        add(sequence, count);
        done += count;
        Tally tally;
        if (random.below(2) == 0)
          for (const PageTable& table : sequence.layer_state(0).pages) CHECK(catch_up(table, tally));
      }
      sequence.restore(point);
      break;
    }
    case 5: {
      auto again = loaded(sequence.cache().shared_from_this(), saved(sequence));
      if (random.below(2) == 0) all[which] = std::move(again);
      break;
    }
    case 6: {  // with hardly any memory left
      Pool& pool = sequence.cache().pool();
      const std::size_t rest = pool.budget_bytes() - pool.reserved_bytes(), left = 256 * at(random.below(40));
      Slot ballast;
      if (rest > left) ballast = pool.take(rest - left);
      error_of([&] { add(sequence, some()); });
      break;
    }
    default:
      add(sequence, some());
  }
}

TEST("a copy that hears only what changed is the table, whatever happens to forks and pages") {
  const long steps = check::number_from("INNERKV_TABLE_STEPS", 1500);
  Tally tally;
  for (const Family& family : families()) {
    CacheConfig config = family.config;
    config.budget_bytes = std::size_t{4} << 20;
    const Tokens tokens = tokens_of(config, 400, 1);
    const auto cache = cache_of(config);
    check::Random random(11);
    Sequences all;
    int wrong = 0;
    for (long step = 0; step < steps; ++step) {
      if (all.empty()) all.push_back(cache->sequence());
      const std::size_t which = at(random.below(static_cast<int>(all.size())));
      if (all[which]->tokens(0) > 1500)
        all.erase(all.begin() + static_cast<std::ptrdiff_t>(which));
      else
        operate(family, tokens, all, which, random);
      for (const auto& sequence : all)
        if (random.below(3) == 0)
          for (const PageTable& table : sequence->layer_state(0).pages) wrong += !catch_up(table, tally);
    }
    CHECK_WITH(wrong == 0, family.name + std::string(": ") + std::to_string(wrong));
    all.clear();
    CHECK(cache->pool().used_bytes() == 0);
  }
  CHECK_WITH(tally.told_all * 4 < tally.looks, std::to_string(tally.told_all) + " of " +
                                                   std::to_string(tally.looks) + " looks were at everything");
}

TEST("tokens that are appended one by one change an entry only when a page or an extent comes") {
  for (const Family& family : families()) {
    const LayerScheme& scheme = family.scheme();
    const Tokens tokens = tokens_of(family.config, 700, 2);
    const auto cache = cache_of(family.config);
    const auto sequence = filled(cache, tokens, 60);
    const PageTable& table = sequence->layer_state(0).pages[1];
    Tally first, then;
    CHECK(catch_up(table, first));
    const std::size_t pages = table.size();
    for (int t = 60; t < 700; ++t) {
      append(*sequence, tokens, t, 1);
      CHECK_WITH(catch_up(table, then), family.name);
    }
    CHECK(then.told_all == 0);
    std::size_t extents = 0;
    for (const PageTable::Entry& page : table) extents += page->k_zeros.size() + page->v_zeros.size();
    CHECK_WITH(at(then.told) <= table.size() - pages + extents, family.name);
    if (!scheme.k.compact_zeros() && !scheme.v.compact_zeros())
      CHECK_WITH(at(then.told) == table.size() - pages, family.name);
  }
}

TEST("a table that nobody looks at for long asks for everything, and so does a fork's") {
  const Family family = families().front();
  const Tokens tokens = tokens_of(family.config, 400, 3);
  const auto sequence = filled(cache_of(family.config), tokens, 300);
  const PageTable& table = sequence->layer_state(0).pages[0];
  Tally tally;
  CHECK(table.all_stale() && catch_up(table, tally) && !table.all_stale());
  const auto fork = sequence->fork();
  const PageTable& forked = fork->layer_state(0).pages[0];
  CHECK(forked.all_stale() && !forked.mirror && !table.all_stale() && table.mirror);
  const PageTable made = table;
  CHECK(made.all_stale() && !made.mirror && made.size() == table.size());
  PageTable other;
  other.mirror = std::make_shared<Copy>();
  other.told();
  other = table;  // as a fork does
  CHECK(other.all_stale() && !other.mirror && other.size() == table.size());
  for (int i = 0; i < 6; ++i) append(*sequence, tokens, 0, 400);
  CHECK(table.all_stale() && catch_up(table, tally));
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("page_table", argc, argv); }
