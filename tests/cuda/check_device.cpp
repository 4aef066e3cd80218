// Runs every kernel of quant/cuda on a device and compares it with the same threads run on the
// host: decoding and encoding bit for bit. Without a device it says so; that it was compiled and
// linked is then all that is known.
#include <budwood/quant/cuda/kernels.h>

#include <cstdio>
#include <cstdlib>

#include "../cpp/quant/kernels/device/device_rows.h"

using namespace budwood::quant;
using namespace budwood::quant::kernels;

namespace {

int failures = 0;

void expect(bool holds, const char* form, const char* what) {
  if (!holds) {
    std::printf("FAILED %s: %s\n", form, what);
    ++failures;
  }
}

void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

/// A copy on the device, kept until the program ends.
template <class T>
T* on_device(const std::vector<T>& values) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, values.size() * sizeof(T)), "cudaMalloc");
  must(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
       "cudaMemcpy");
  return static_cast<T*>(memory);
}

template <class T>
std::vector<T> on_host(const T* memory, size_t count) {
  std::vector<T> values(count);
  must(cudaDeviceSynchronize(), "a kernel");
  must(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return values;
}

/// host and device hold the same weight.
template <class Rows>
void check_rows(const char* form, const Rows& host, const Rows& device) {
  const auto n = static_cast<size_t>(host.rows * host.cols);
  std::vector<float> wanted(n);
  expect(decode_on_host(host, 0, host.rows, nullptr, {wanted.data(), FloatType::fp32}), form,
         "sizes");
  float* all = on_device(std::vector<float>(n));
  must(cuda::decode_rows(device, 0, host.rows, nullptr, {all, FloatType::fp32}, nullptr), form);
  expect(same_bits(on_host(all, n), wanted), form, "decoded values");

  const std::vector<int64_t> ids = {host.rows - 1, 0, host.rows / 2};
  const auto chosen = static_cast<size_t>(3 * host.cols);
  for (const FloatType type : {FloatType::bf16, FloatType::fp16}) {
    std::vector<uint16_t> halves(chosen);
    decode_on_host(host, 0, 3, ids.data(), {halves.data(), type});
    uint16_t* some = on_device(std::vector<uint16_t>(chosen));
    must(cuda::decode_rows(device, 0, 3, on_device(ids), {some, type}, nullptr), form);
    expect(on_host(some, chosen) == halves, form, "chosen rows in 16 bits");
  }

  for (const int tokens : {1, 3, kFewTokens}) {
    const std::vector<float> x = normal_floats(tokens * host.cols, 5);
    const auto m = static_cast<size_t>(tokens * host.rows);
    std::vector<float> y(m);
    multiply_on_host(host, {x.data(), FloatType::fp32}, tokens, {y.data(), FloatType::fp32});
    float* found = on_device(std::vector<float>(m));
    must(cuda::multiply_few(device, {on_device(x), FloatType::fp32}, tokens,
                            {found, FloatType::fp32}, nullptr),
         form);
    expect(same_bits(on_host(found, m), y), form, "products");
  }
}

template <GgmlType kType>
void check_gguf(const char* form) {
  const int64_t rows = 7, cols = 512;
  auto bytes = random_bytes(rows * cols / gguf_block_elements(kType) * gguf_block_bytes(kType), 1);
  // Scales that are finite: a NaN may lose its payload on the device.
  constexpr int kScale = kType == GgmlType::q6_k ? 208 : 0;
  for (size_t b = 0; b < bytes.size(); b += gguf_block_bytes(kType)) {
    bytes[b + kScale + 1] &= 0x3f;
    bytes[b + 3] &= 0x3f;
  }
  check_rows<GgufRows<kType>>(form, {.rows = rows, .cols = cols, .blocks = bytes.data()},
                              {.rows = rows, .cols = cols, .blocks = on_device(bytes)});
}

void check_bnb4(Bnb4Type type, const char* form) {
  for (const int64_t cols : {192, 75}) {
    const int64_t rows = 31, size = 64, count = rows * cols, blocks = bnb4_blocks(count, size);
    const auto values = normal_floats(count, 3);
    std::vector<uint8_t> codes(static_cast<size_t>(bnb4_bytes(count)));
    std::vector<float> absmax(static_cast<size_t>(blocks));
    Bnb4Source source{type, {values.data(), FloatType::fp32}, count, size};
    encode_on_host(source, codes.data(), absmax.data());
    source.values.data = on_device(values);
    uint8_t* device_codes = on_device(std::vector<uint8_t>(codes.size()));
    float* device_absmax = on_device(std::vector<float>(absmax.size()));
    auto* bad = on_device(std::vector<unsigned long long>(1));
    must(cuda::encode_bnb4(source, device_codes, device_absmax, bad, nullptr), form);
    expect(on_host(bad, 1)[0] == ~0ull, form, "all values are finite");
    expect(on_host(device_codes, codes.size()) == codes, form, "codes");
    expect(same_bits(on_host(device_absmax, absmax.size()), absmax), form, "scales");

    Bnb4Rows host{.type = type,
                  .rows = rows,
                  .cols = cols,
                  .block_size = size,
                  .stated_block_size = &size,
                  .codes = codes.data(),
                  .absmax = absmax.data()};
    Bnb4Rows device = host;
    device.stated_block_size = on_device(std::vector<int64_t>{size});
    device.codes = device_codes;
    device.absmax = device_absmax;
    check_rows(form, host, device);

    const auto scale_codes = random_bytes(blocks, 4);
    const std::vector<float> map(dynamic_map(), dynamic_map() + 256), offset = {0.4f};
    const auto nested = normal_floats((blocks + 255) / 256, 6);
    host.absmax = device.absmax = nullptr;
    host.absmax_codes = scale_codes.data();
    host.map = map.data();
    host.nested_absmax = nested.data();
    host.offset = offset.data();
    device.absmax_codes = on_device(scale_codes);
    device.map = on_device(map);
    device.nested_absmax = on_device(nested);
    device.offset = on_device(offset);
    check_rows(form, host, device);
  }
  auto values = normal_floats(300, 3);
  values[77] = NAN;
  values[290] = INFINITY;
  auto* bad = on_device(std::vector<unsigned long long>(1));
  must(cuda::encode_bnb4({type, {on_device(values), FloatType::fp32}, 300, 64},
                         on_device(std::vector<uint8_t>(150)), on_device(std::vector<float>(5)),
                         bad, nullptr),
       form);
  expect(on_host(bad, 1)[0] == 77, form, "the first value that is not finite");
}

template <int kBits>
void check_affine(const char* form) {
  for (const int64_t size : {32, 5}) {
    const int64_t rows = 9, cols = 96, groups = affine_groups(cols, size);
    const auto codes = random_bytes(rows * affine_row_bytes(kBits, cols), 1);
    const auto scales = normal_floats(rows * groups, 2), zeros = normal_floats(rows * groups, 3);
    const auto zero_points = random_bytes(rows * groups, 4);
    AffineRows<kBits> host{.rows = rows,
                           .cols = cols,
                           .groups = groups,
                           .stated_size = &size,
                           .codes = codes.data(),
                           .scales = scales.data(),
                           .zeros = zeros.data()};
    AffineRows<kBits> device = host;
    device.stated_size = on_device(std::vector<int64_t>{size});
    device.codes = on_device(codes);
    device.scales = on_device(scales);
    device.zeros = on_device(zeros);
    check_rows(form, host, device);
    host.zeros = device.zeros = nullptr;
    host.zero_points = zero_points.data();
    device.zero_points = on_device(zero_points);
    check_rows(form, host, device);
  }
}

void check_int8() {
  const auto bytes = random_bytes(9 * 75, 1);
  const std::vector<int8_t> codes(bytes.begin(), bytes.end());
  const auto scb = normal_floats(9, 2);
  check_rows<Int8Rows>("int8", {.rows = 9, .cols = 75, .codes = codes.data(), .scb = scb.data()},
                       {.rows = 9, .cols = 75, .codes = on_device(codes), .scb = on_device(scb)});
}

}  // namespace

int main() {
  // Refused before anything is launched, so on every machine.
  expect(cuda::multiply_few(Int8Rows{}, {}, 0, {}, nullptr) == cudaErrorInvalidValue, "int8",
         "no tokens are refused");
  expect(cuda::decode_rows(Int8Rows{}, 0, 1, nullptr, {}, nullptr) == cudaErrorInvalidValue, "int8",
         "an empty weight is refused");
  expect(cuda::encode_bnb4({}, nullptr, nullptr, nullptr, nullptr) == cudaErrorInvalidValue, "nf4",
         "an empty source is refused");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("compiled and linked; no CUDA device here: no kernel was run\n");
    return failures == 0 ? 0 : 1;
  }
  check_bnb4(Bnb4Type::nf4, "nf4");
  check_bnb4(Bnb4Type::fp4, "fp4");
  check_affine<4>("affine4");
  check_affine<8>("affine8");
  check_int8();
  check_gguf<GgmlType::q4_0>("Q4_0");
  check_gguf<GgmlType::q4_1>("Q4_1");
  check_gguf<GgmlType::q5_0>("Q5_0");
  check_gguf<GgmlType::q5_1>("Q5_1");
  check_gguf<GgmlType::q8_0>("Q8_0");
  check_gguf<GgmlType::q4_k>("Q4_K");
  check_gguf<GgmlType::q5_k>("Q5_K");
  check_gguf<GgmlType::q6_k>("Q6_K");
  std::printf("%s on a CUDA device\n",
              failures == 0 ? "all kernels agree with the host" : "FAILED");
  return failures == 0 ? 0 : 1;
}
