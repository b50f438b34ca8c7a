// restore() brings a sequence back to the bit, windows included, however far the appends went.
#include <vector>

#include "support.h"

namespace innerkv::test {
namespace {

TEST("restore() after appends leaves bits, memory and everything that follows as without them") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 500, 1), others = tokens_of(family.config, 500, 2);
    for (const int n : {0, 1, 3, 13, 47, 60, 139, 141, 200})
      for (const int added : {1, 2, 31, 130, 290}) {
        const auto cache = cache_of(family.config);
        auto sequence = filled(cache, tokens, n);
        const Bytes before = contents(*sequence);
        const std::size_t held = cache->pool().used_bytes();
        const Checkpoint point = sequence->checkpoint(added);
        for (int done = 0; done < added;) {  // in uneven pieces, and not all that was announced
          const int count = std::min(added - done, 1 + done % 50);
          append(*sequence, others, done, count);
          done += count;
        }
        sequence->restore(point);
        CHECK_WITH(sequence->tokens(0) == n && contents(*sequence) == before, family.name);
        CHECK_WITH(cache->pool().used_bytes() == held, family.name);
        append(*sequence, tokens, n, 150);
        const auto fresh = filled(cache_of(family.config), tokens, n);
        append(*fresh, tokens, n, 150);
        CHECK_WITH(contents(*sequence) == contents(*fresh), family.name);
        CHECK_WITH(same_bits(attended(*sequence), attended(*fresh)), family.name);
      }
  }
}

TEST("restore() after truncation: pages may have held more extents of zero points than they need") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 500, 1), others = tokens_of(family.config, 500, 2);
    const auto cache = cache_of(family.config);
    for (const int left : {20, 70, 135, 170})
      for (const int added : {1, 40, 200}) {
        const auto sequence = filled(cache, tokens, 300);
        sequence->truncate(left);
        const Bytes before = contents(*sequence);
        const Checkpoint point = sequence->checkpoint(added);
        append(*sequence, others, 0, added);
        sequence->restore(point);
        CHECK_WITH(contents(*sequence) == before, family.name);
        const auto fork = sequence->fork(), again = loaded(cache, saved(*sequence));
        for (Sequence* one : {fork.get(), sequence.get(), again.get()}) append(*one, tokens, 0, 300);
        CHECK_WITH(contents(*fork) == contents(*again) && contents(*sequence) == contents(*again),
                   family.name);
      }
    CHECK(cache->pool().used_bytes() == 0);
  }
}

TEST("restore() never touches a fork that shares pages") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 400, 1), others = tokens_of(family.config, 400, 2);
    const auto cache = cache_of(family.config);
    auto sequence = filled(cache, tokens, 170);
    const auto fork = sequence->fork();
    const Bytes before = contents(*sequence);
    const Checkpoint point = sequence->checkpoint(100);
    append(*sequence, others, 0, 100);
    CHECK_WITH(contents(*fork) == before, family.name);
    sequence->restore(point);
    CHECK_WITH(contents(*fork) == before && contents(*sequence) == before, family.name);
    append(*fork, others, 0, 90);
    CHECK_WITH(contents(*sequence) == before, family.name);
    // Nor one that was made after the appends.
    const Checkpoint again = sequence->checkpoint(200);
    append(*sequence, others, 0, 200);
    const auto later = sequence->fork();
    const Bytes then = contents(*later);
    sequence->restore(again);
    CHECK_WITH(contents(*later) == then && contents(*sequence) == before, family.name);
    append(*sequence, tokens, 0, 60);
    CHECK_WITH(contents(*later) == then, family.name);
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("restore", argc, argv); }
