#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/merge_plan.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

namespace budwood {
namespace {

constexpr const char* kHead = "lm_head";

bool is_float(io::Dtype dtype) {
  return dtype == io::Dtype::f32 || dtype == io::Dtype::bf16 || dtype == io::Dtype::f16;
}

io::Dtype dtype_of(const std::string& name, io::Dtype own) {
  if (name == "auto" || !is_float(own)) return own;
  if (name == "float32") return io::Dtype::f32;
  if (name == "bfloat16") return io::Dtype::bf16;
  if (name == "float16") return io::Dtype::f16;
  throw Error("merge_files",
              fmt::format("dtype is auto, float32, bfloat16 or float16, found '{}'", name));
}

}  // namespace

MergePlan::MergePlan(const MergeFilesOptions& options)
    : base(io::ModelFiles::open(options.model, io::Access::headers)),
      layout(options.model, base),
      dtype_(options.dtype) {
  if (options.adapters.empty()) throw Error("merge_files", "no adapter is given");
  outputs.reserve(base.tensors().size() + 1);  // and a head
  for (const auto* tensor : base.tensors())
    outputs.push_back(
        {.spec = {tensor->name, dtype_of(options.dtype, tensor->dtype), tensor->shape},
         .source = tensor});
  for (const auto& source : options.adapters)
    adapters.push_back(std::make_unique<AdapterFile>(AdapterFile::open(source.path)));
  for (size_t i = 0; i < adapters.size(); ++i) {
    const auto& config = adapters[i]->config();
    warnings.insert(warnings.end(), config.warnings.begin(), config.warnings.end());
    add_whole(*adapters[i], options.adapters[i].weight);
    add_token_rows(*adapters[i]);
    add(*adapters[i], options.adapters[i].weight);
    check_targets(*adapters[i]);
  }
  if (!faults_.empty())
    throw Error("merge_files",
                fmt::format("{} does not fit {}:\n  {}",
                            options.adapters.size() == 1 ? "the adapter" : "an adapter",
                            options.model.string(), fmt::join(faults_, "\n  ")));
  keep_tied_head();
}

// The output of a tensor that an adapter names, null when there is none; that of the head of a tied
// model is made.
MergeOutput* MergePlan::output_of(const std::string& name) {
  const auto* tensor = layout.find(name);
  const bool head = tensor == nullptr && name == std::string(kHead) + ".weight";
  if (head) tensor = layout.tied_table();
  if (tensor == nullptr) return nullptr;
  const auto wanted = head ? name : tensor->name;
  for (auto& output : outputs)
    if (output.spec.name == wanted) return &output;
  unties = true;
  outputs.push_back(
      {.spec = {wanted, dtype_of(dtype_, tensor->dtype), tensor->shape}, .source = tensor});
  return &outputs.back();
}

void MergePlan::add(const AdapterFile& adapter, double weight) {
  for (const auto& [module, is_table] : adapter.modules()) {
    auto* const found = output_of(module + ".weight");
    if (found == nullptr) {
      faults_.push_back(
          fmt::format("{} of {} has no weight in the model", module, adapter.folder().string()));
      continue;
    }
    auto& output = *found;
    if (!is_float(output.source->dtype) || output.spec.shape.size() != 2) {
      faults_.push_back(fmt::format("{} is {} {}; a matrix of F32, BF16 or F16 is wanted",
                                    output.spec.name, io::dtype_name(output.source->dtype),
                                    io::shape_text(output.spec.shape)));
      continue;
    }
    output.transposed = is_table || layout.stores_transposed(module);
    const auto term = adapter.term(module);
    const int64_t in = output.spec.shape[output.transposed ? 0 : 1];
    const int64_t out = output.spec.shape[output.transposed ? 1 : 0];
    const auto check = [&](const FloatArray& array, int64_t wanted, const char* what) {
      if (array.defined() && array.size() != wanted)
        faults_.push_back(fmt::format("{}: {} holds {} values, the weight is {}", module, what,
                                      array.size(), io::shape_text(output.spec.shape)));
    };
    if (term.a.defined() && ((term.leading_a ? term.a.shape[1] < in : term.a.shape[1] != in) ||
                             term.b.shape[0] != out || term.a.shape[0] != term.b.shape[1]))
      faults_.push_back(fmt::format("{}: factors {} and {} do not make {}", module,
                                    io::shape_text(term.a.shape), io::shape_text(term.b.shape),
                                    io::shape_text(output.spec.shape)));
    check(term.gain, out, "the factor of the output");
    check(term.magnitude, out, "the magnitude");
    check(term.inner_bias, out, "the bias of B");
    check(term.input_gain, in, "the factor of the input");
    if (output.alone || (term.magnitude.defined() && (weight != 1.0 || !output.edits.empty())))
      faults_.push_back(fmt::format("{}: DoRA is merged alone, and at weight 1", module));
    output.alone |= term.magnitude.defined();
    output.edits.push_back({&adapter, module, weight});
    if (!term.inner_bias.defined() && !term.gain.defined()) continue;
    if (auto* const bias = output_of(module + ".bias")) {
      bias->bias = true;
      bias->edits.push_back({&adapter, module, weight});
    } else if (term.inner_bias.defined()) {
      faults_.push_back(
          fmt::format("{} has no bias that could take the adapter's (lora_bias=True)", module));
    }
  }
}

void MergePlan::add_whole(const AdapterFile& adapter, double weight) {
  for (const auto& [name, tensor] : adapter.whole()) {
    auto* const found = output_of(name);
    if (found == nullptr) {
      faults_.push_back(
          fmt::format("{} of {} has no counterpart in the model", name, adapter.folder().string()));
      continue;
    }
    auto& output = *found;
    if (tensor->shape != output.spec.shape)
      faults_.push_back(fmt::format("{} is {}, the model's is {}", name,
                                    io::shape_text(tensor->shape),
                                    io::shape_text(output.spec.shape)));
    if (weight != 1.0)
      faults_.push_back(fmt::format("{} is held whole by {}, which is merged at weight 1 only",
                                    name, adapter.folder().string()));
    if (output.whole != nullptr) faults_.push_back(fmt::format("two adapters hold {} whole", name));
    output.whole = tensor;
  }
}

void MergePlan::add_token_rows(const AdapterFile& adapter) {
  for (const auto& [table, tensor] : adapter.token_rows()) {
    auto* const found = output_of(table + ".weight");
    if (found == nullptr) {
      faults_.push_back(fmt::format("{} has no table in the model", table));
      continue;
    }
    auto& output = *found;
    const auto ids = adapter.token_ids(table);
    if (tensor->shape.size() != 2 || output.spec.shape.size() != 2 ||
        tensor->shape[0] != static_cast<int64_t>(ids.size()) ||
        tensor->shape[1] != output.spec.shape[1])
      faults_.push_back(fmt::format("{}: {} new rows are {}, the table is {}", table, ids.size(),
                                    io::shape_text(tensor->shape),
                                    io::shape_text(output.spec.shape)));
    for (const auto id : ids)
      if (id < 0 || id >= output.spec.shape[0])
        faults_.push_back(fmt::format("{}: there is no row {} in a table of {}", table, id,
                                      output.spec.shape[0]));
    output.rows.emplace_back(ids, tensor);
  }
}

// The modules that the configuration means, and that the file says nothing about.
void MergePlan::check_targets(const AdapterFile& adapter) {
  std::vector<std::string> matched;
  try {
    matched =
        match_targets(adapter.config(), layout.modules(), layout.model_type(), Strictness::lenient)
            .matched;
  } catch (const Error&) {
    return;  // names that are not the files'
  }
  std::set<std::string> changed;
  for (const auto& [module, table] : adapter.modules())
    if (const auto* tensor = layout.find(module + ".weight")) changed.insert(tensor->name);
  for (const auto& [name, tensor] : adapter.whole())
    if (const auto* own = layout.find(name)) changed.insert(own->name);
  for (const auto& module : matched)
    if (!changed.contains(module + ".weight"))
      faults_.push_back(fmt::format("{} is one of the targets, and {} holds nothing for it", module,
                                    adapter.folder().string()));
}

// A head that reads the table goes on as it was when the table alone is changed. New rows of
// single tokens are those of both.
void MergePlan::keep_tied_head() {
  const auto* table = layout.tied_table();
  if (table == nullptr) return;
  const auto name = std::string(kHead) + ".weight";
  const auto of = [&](const std::string& wanted) {
    return std::find_if(outputs.begin(), outputs.end(),
                        [&](const auto& output) { return output.spec.name == wanted; });
  };
  const auto changed = of(table->name);
  const auto rows = changed->rows;
  if (of(name) == outputs.end()) {
    if (changed->edits.empty() && changed->whole == nullptr) return;
    unties = true;
    outputs.push_back(
        {.spec = {name, dtype_of(dtype_, table->dtype), table->shape}, .source = table});
  }
  of(name)->rows = rows;
}

}  // namespace budwood
