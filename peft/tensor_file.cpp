#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <budwood/peft/tensor_file.h>
#include <budwood/quant/error.h>
#include <cstdint>
#include <cstring>

namespace budwood {
namespace {

struct Pair {
  io::Dtype stored;
  at::ScalarType type;
};

constexpr Pair kPairs[] = {
    {io::Dtype::f32, at::kFloat},
    {io::Dtype::bf16, at::kBFloat16},
    {io::Dtype::f16, at::kHalf},
    {io::Dtype::f64, at::kDouble},
    {io::Dtype::u8, at::kByte},
    {io::Dtype::i8, at::kChar},
    {io::Dtype::i16, at::kShort},
    {io::Dtype::i32, at::kInt},
    {io::Dtype::i64, at::kLong},
    {io::Dtype::boolean, at::kBool},
    {io::Dtype::u16, at::kUInt16},
    {io::Dtype::u32, at::kUInt32},
    {io::Dtype::u64, at::kUInt64},
    {io::Dtype::c64, at::kComplexFloat},
    {io::Dtype::f8_e4m3, at::kFloat8_e4m3fn},
    {io::Dtype::f8_e5m2, at::kFloat8_e5m2},
};

}  // namespace

at::ScalarType scalar_type(io::Dtype dtype) {
  for (const auto& pair : kPairs)
    if (pair.stored == dtype) return pair.type;
  throw Error("safetensors", fmt::format("dtype {} has no tensor type", io::dtype_name(dtype)));
}

io::Dtype stored_dtype(at::ScalarType type) {
  for (const auto& pair : kPairs)
    if (pair.type == type) return pair.stored;
  throw Error("safetensors", fmt::format("{} cannot be stored", c10::toString(type)));
}

at::ScalarType scalar_type_of(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw Error("dtype", fmt::format("unknown dtype '{}'; known: float32, bfloat16, float16", name));
}

std::string dtype_text(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kDouble:
      return "float64";
    default:
      return c10::toString(type);
  }
}

at::Tensor as_tensor(const io::TensorInfo& info) {
  const auto options = at::TensorOptions().dtype(scalar_type(info.dtype));
  auto* data = const_cast<std::byte*>(info.data);  // the mapping is private: writes are copied
  const auto alignment = std::max<uint64_t>(1, io::dtype_bits(info.dtype) / 8);
  if (info.bytes() == 0) return at::empty(info.shape, options);
  if (reinterpret_cast<uintptr_t>(data) % alignment == 0)
    return at::from_blob(
        data, info.shape, [file = info.file](void*) {}, options);
  auto copy = at::empty(info.shape, options);
  std::memcpy(copy.data_ptr(), data, info.bytes());
  return copy;
}

void write_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                   const io::Metadata& metadata) {
  std::vector<at::Tensor> held;
  std::vector<io::TensorData> data;
  for (const auto& [name, tensor] : tensors) {
    held.push_back(tensor.detach().cpu().contiguous());
    const auto& t = held.back();
    data.push_back({{name, stored_dtype(t.scalar_type()), t.sizes().vec()},
                    {static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()}});
  }
  io::write_safetensors(path, data, metadata);
}

NamedTensors read_pickle(const std::filesystem::path& path) {
  const auto bytes = io::read_file(path);
  c10::IValue value;
  try {
    value = torch::jit::pickle_load(std::vector<char>(bytes.begin(), bytes.end()));
  } catch (const std::exception& e) {
    throw Error("read_pickle",
                fmt::format("{} is not a file of tensors: {}", path.string(), e.what()));
  }
  if (!value.isGenericDict())
    throw Error("read_pickle", fmt::format("{} is not a plain dictionary of tensors: save it again "
                                           "as safetensors",
                                           path.string()));
  NamedTensors tensors;
  for (const auto& entry : value.toGenericDict()) {
    if (!entry.key().isString() || !entry.value().isTensor())
      throw Error("read_pickle",
                  fmt::format("{} holds something that is not a named tensor", path.string()));
    tensors.emplace_back(entry.key().toStringRef(), entry.value().toTensor());
  }
  return tensors;
}

}  // namespace budwood
