#include "parameters.h"

#include <algorithm>
#include <utility>

namespace infinilm::cpu {

Parameter& ParameterList::add(std::string name, std::vector<int64_t> shape,
                              std::function<void(const SourceMatrix&)> store) {
  Parameter parameter;
  parameter.name = std::move(name);
  parameter.shape = std::move(shape);
  parameter.store = std::move(store);
  parameters_.push_back(std::move(parameter));
  return parameters_.back();
}

Parameter& ParameterList::add_vector(std::string name, int64_t size, float* out, float offset) {
  return add_vector_in_blocks(std::move(name), size, out, kBlock, offset);
}

Parameter& ParameterList::add_vector_in_blocks(std::string name, int64_t size, float* out, int64_t stride,
                                               float offset) {
  return add(std::move(name), {size}, [=](const SourceMatrix& source) {
    std::vector<float> values(size);
    widen(source, 0, size, values.data());
    for (int64_t i = 0; i < size; ++i) out[i / kBlock * stride + i % kBlock] = values[i] + offset;
  });
}

Parameter& ParameterList::add_matrix(std::string name, int64_t num_rows, PackedMatrix* matrix,
                                     std::function<int64_t(int64_t)> place, int64_t rows_per_part) {
  const int64_t in_features = matrix->in_features();
  const int64_t part = rows_per_part ? rows_per_part : num_rows;
  ThreadPool* pool = pool_;
  return add(std::move(name), {num_rows, in_features}, [=](const SourceMatrix& source) {
    matrix->take_memory();
    const int64_t blocks_per_part = (part + kBlock - 1) / kBlock;
    const int64_t num_blocks = num_rows / part * blocks_per_part;
    const int64_t element = source.is_bf16 ? 2 : 4;
    std::vector<int64_t> wanted(matrix->num_blocks(), -1);  // by the thread that a product gives them to
    for (int64_t block = 0; block < num_blocks; ++block) wanted[place(block)] = block;
    pool->run(1, [&](int thread) {
      pool->phase(thread, matrix->num_blocks(), [&](int64_t target) {
        const int64_t block = wanted[target];
        if (block < 0) return;
        const int64_t first_row = block / blocks_per_part * part;
        const SourceMatrix rows{source.data + first_row * in_features * element, source.is_bf16};
        matrix->pack_block(rows, part, block % blocks_per_part, target);
      });
    });
  });
}

}  // namespace infinilm::cpu
