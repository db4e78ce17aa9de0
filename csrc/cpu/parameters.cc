#include "parameters.h"

#include <algorithm>
#include <utility>

#include "errors.h"

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
  if (matrix->format() == WeightFormat::kI4Zero) return add_stored(name, num_rows, matrix, place, part);
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

Packing ParameterList::packing_of(const std::vector<std::string>& names, Packing otherwise) const {
  int64_t group = 0;
  for (const std::string& name : names) {
    const StoredInt4* stored = stored_.find(name);
    if (stored == nullptr || (group && stored->group != group)) return otherwise;
    group = stored->group;
  }
  return group ? Packing{WeightFormat::kI4Zero, group} : otherwise;
}

Parameter& ParameterList::add_stored(const std::string& name, int64_t num_rows, PackedMatrix* matrix,
                                     const std::function<int64_t(int64_t)>& place, int64_t rows_per_part) {
  const int64_t blocks_per_part = (rows_per_part + kBlock - 1) / kBlock;
  std::vector<StoredMatrix::BlockRows> rows(matrix->num_blocks());
  for (int64_t block = 0; block < num_rows / rows_per_part * blocks_per_part; ++block) {
    const int64_t skipped = block % blocks_per_part * kBlock;
    rows[place(block)] = {block / blocks_per_part * rows_per_part + skipped, std::min(kBlock, rows_per_part - skipped)};
  }
  const StoredInt4 stored = *stored_.find(name);
  auto parts = std::make_shared<StoredMatrix>(name, stored, num_rows, matrix, std::move(rows), pool_);
  stored_matrices_.push_back(parts);
  const int64_t in_features = matrix->in_features(), num_groups = matrix->depth() / stored.group;
  const auto add_part = [&](const char* role, const char* dtype, std::vector<int64_t> shape,
                            void (StoredMatrix::*put)(const std::byte*)) {
    add(name + role, std::move(shape), [=](const SourceMatrix& source) { (parts.get()->*put)(source.data); }).dtype =
        dtype;
  };
  if (stored.has_groups) add_part(":group", "int32", {in_features}, &StoredMatrix::put_group);
  add_part(":scale", "float16", {num_groups, num_rows}, &StoredMatrix::put_scale);
  add_part(":zero", "int32", {num_groups, (num_rows + 7) / 8}, &StoredMatrix::put_zero);
  const std::vector<int64_t> shape =
      stored.is_awq ? std::vector<int64_t>{in_features, num_rows / 8} : std::vector<int64_t>{in_features / 8, num_rows};
  add_part(":weight", "int32", shape, &StoredMatrix::put_weight);
  return parameters_.back();
}

void ParameterList::finish() {
  std::map<PackedMatrix*, const StoredMatrix*> firsts;
  for (const auto& parts : stored_matrices_) {
    const StoredMatrix* first = firsts.emplace(parts->matrix(), parts.get()).first->second;
    if (first->order() != parts->order()) {
      throw Invalid("g_idx of " + parts->name() + " has input features in another order than that of " +
                    first->name() + ", and the cpu backend multiplies both at once; run the model on another backend");
    }
    parts->matrix()->set_order(parts->order());
  }
}

}  // namespace infinilm::cpu
