// Activations on their way into a product: rows in the format its kernel wants, zero up to its depth.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "memory.h"

namespace infinilm::cpu {

class RowBuffer {
 public:
  // Make room for so many rows of any format and of up to `max_depth` elements.
  void reserve(int64_t num_rows, int64_t max_depth);
  int64_t num_bytes() const { return memory_.size(); }

  // Rows of `depth` elements, to be written with put. Earlier ones are no longer valid.
  Rows rows(RowFormat format, int64_t num_rows, int64_t depth) const;

 private:
  Buffer memory_;
};

// Write x, (size,), as row `row`.
void put_row(const Kernels& kernels, RowFormat format, const Rows& rows, int64_t row, const float* x, int64_t size,
             int64_t depth);

// Copy row `from` of one to row `to` of another of the same format and depth.
void copy_row(RowFormat format, const Rows& source, int64_t from, const Rows& target, int64_t to);

}  // namespace infinilm::cpu
