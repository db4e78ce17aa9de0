// The least a test needs: a check that says where, with what, and lets the rest run.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline int& num_failed() {
  static int count = 0;
  return count;
}

inline void check_at(bool is_right, const std::string& what, const char* file, int line) {
  if (is_right) return;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++num_failed();
}

#define CHECK(condition, what) check_at((condition), std::string(#condition) + ": " + (what), __FILE__, __LINE__)

inline int finish() {
  if (num_failed()) std::printf("%d checks failed\n", num_failed());
  return num_failed() ? EXIT_FAILURE : EXIT_SUCCESS;
}
