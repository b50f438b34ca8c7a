// The test harness itself: that parts of a program leave nothing out.
#include "check.h"

TEST("parts of a program hold each test once, and together all") {
  for (unsigned of = 1; of <= 7; ++of)
    for (std::size_t index = 0; index < 50; ++index) {
      int holders = 0;
      for (unsigned which = 1; which <= of; ++which)
        holders += check::in_part(index, (std::to_string(which) + "/" + std::to_string(of)).c_str());
      CHECK_WITH(holders == 1, std::to_string(index) + " of " + std::to_string(of));
    }
}

TEST("what names no part holds nothing, so its program fails") {
  for (const char* part : {"", "1", "1/", "/1", "0/3", "4/3", "1/0", "0/0", "-1/3", "1/3x", "one/two"})
    for (std::size_t index = 0; index < 7; ++index) CHECK_WITH(!check::in_part(index, part), part);
}

int main(int argc, char** argv) { return check::run("check_test", argc, argv); }
