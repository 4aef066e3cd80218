#include <fmt/format.h>

#include <budwood/quant/checkpoints/bitsandbytes.h>
#include <budwood/quant/checkpoints/integers.h>
#include <budwood/quant/error.h>
#include <nlohmann/json.hpp>

namespace budwood::quant {
namespace {

using Json = nlohmann::ordered_json;

// transformers leaves the output layer plain of its own accord.
Json skipped(const std::vector<std::string>& plain) {
  if (plain.size() == 1 && plain[0] == "lm_head") return nullptr;
  return plain;
}

const char* torch_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

std::string bnb_config(const Weight& w, at::ScalarType dtype,
                       const std::vector<std::string>& plain) {
  const bool eight = w.format == Format::int8_rows;
  return Json{{"_load_in_4bit", !eight},
              {"_load_in_8bit", eight},
              {"bnb_4bit_compute_dtype", torch_name(dtype)},
              {"bnb_4bit_quant_storage", "uint8"},
              {"bnb_4bit_quant_type", w.format == Format::nf4 ? "nf4" : "fp4"},
              {"bnb_4bit_use_double_quant", w.parts.size() == 6},
              {"llm_int8_enable_fp32_cpu_offload", false},
              {"llm_int8_has_fp16_weight", false},
              {"llm_int8_skip_modules", skipped(plain)},
              {"llm_int8_threshold", 6.0},
              {"load_in_4bit", !eight},
              {"load_in_8bit", eight},
              {"quant_method", "bitsandbytes"}}
      .dump();
}

}  // namespace

std::string integer_settings(int bits, const std::vector<std::string>& plain) {
  return Json{{"quant_method", "budwood"},
              {"version", 1},
              {"bits", bits},
              {"modules_to_not_convert", plain}}
      .dump();
}

CheckpointWriter checkpoint_writer(const std::vector<const Weight*>& weights,
                                   at::ScalarType dtype) {
  if (weights.empty()) throw Error("save", "no weight is packed: there is nothing to describe");
  const auto first = *weights[0];
  for (const auto* w : weights)
    if (w->format != first.format)
      throw Error("save",
                  fmt::format("one folder holds packed weights of one form, found {} and {}",
                              form_of(first.format).name(), form_of(w->format).name()));
  switch (first.format) {
    case Format::nf4:
    case Format::fp4:
    case Format::int8_rows:
      return {
          [=](const std::vector<std::string>& plain) { return bnb_config(first, dtype, plain); },
          [=](const Weight& w) { return bnb_parts(w, dtype); }};
    case Format::affine4:
    case Format::affine8:
      return {[=](const std::vector<std::string>& plain) {
                return integer_settings(first.format == Format::affine4 ? 4 : 8, plain);
              },
              [](const Weight& w) { return integer_parts(w); }};
    default:
      throw Error("save", fmt::format("a folder has no place for {} weights; they are saved as a "
                                      "GGUF file, or decoded with weights='dense'",
                                      form_of(first.format).name()));
  }
}

}  // namespace budwood::quant
