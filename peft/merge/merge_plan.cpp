#include <budwood/peft/io/text.h>
#include <budwood/peft/merge/merge_plan.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <set>

namespace budwood {
namespace {

constexpr const char* kHead = "lm_head";
// Weights of an adapter's base that are compared with the model's.
constexpr size_t kComparedWeights = 24;

bool is_float(io::Dtype dtype) {
  return dtype == io::Dtype::f32 || dtype == io::Dtype::bf16 || dtype == io::Dtype::f16;
}

// Blocks of GGUF files are made of float32.
io::Dtype dtype_of(const std::string& name, io::Dtype own) {
  if (name == "auto" || !is_float(own)) return own;
  if (name == "float32" || name.starts_with("q")) return io::Dtype::f32;
  if (name == "bfloat16") return io::Dtype::bf16;
  return io::Dtype::f16;
}

void check_options(const MergeFilesOptions& options) {
  const auto one_of = [](const std::string& what, const std::string& found,
                         const std::vector<std::string>& known) {
    if (std::find(known.begin(), known.end(), found) == known.end())
      throw Error("merge_files",
                  fmt::format("{} is {}, found '{}'", what, fmt::join(known, ", "), found));
  };
  std::vector<std::string> dtypes = {"auto", "float32", "bfloat16", "float16"};
  if (options.out.extension() == ".gguf") dtypes.insert(dtypes.end(), {"q8_0", "q4_0", "q4_1"});
  one_of("dtype", options.dtype, dtypes);
  one_of("into", options.into, {"dequantised", "requantised", "original16"});
  if ((options.into == "original16") == options.original.empty())
    throw Error("merge_files",
                options.original.empty()
                    ? "into original16 needs the plain model that was quantised: original"
                    : fmt::format("original is for into original16, found '{}'", options.into));
  if (options.into == "requantised" && options.dtype != "auto")
    throw Error("merge_files", fmt::format("codes that are made anew are of the model's own kind: "
                                           "dtype is auto, found '{}'",
                                           options.dtype));
  if (options.adapters.empty()) throw Error("merge_files", "no adapter is given");
}

const std::filesystem::path& folded_into(const MergeFilesOptions& options) {
  check_options(options);
  return options.original.empty() ? options.model : options.original;
}

}  // namespace

MergePlan::MergePlan(const MergeFilesOptions& options)
    : base(open_merge_base(folded_into(options))), layout(*base), dtype_(options.dtype) {
  outputs.reserve(base->tensors().size() + 1);  // and a head
  for (const auto* tensor : base->tensors())
    outputs.push_back(
        {.spec = {tensor->name, dtype_of(options.dtype, tensor->dtype), tensor->shape},
         .source = tensor});
  for (const auto& source : options.adapters)
    adapters.push_back(
        std::make_unique<AdapterFile>(AdapterFile::open(source.path, options.model)));
  for (size_t i = 0; i < adapters.size(); ++i) {
    const auto& config = adapters[i]->config();
    warnings.insert(warnings.end(), config.warnings.begin(), config.warnings.end());
    add_whole(*adapters[i], options.adapters[i].weight);
    add_token_rows(*adapters[i]);
    add(*adapters[i], options.adapters[i].weight);
    add_stacks(*adapters[i], options.adapters[i].weight);
    check_targets(*adapters[i]);
  }
  if (!faults_.empty())
    throw Error("merge_files",
                fmt::format("{} does not fit {}:\n  {}",
                            options.adapters.size() == 1 ? "the adapter" : "an adapter",
                            options.model.string(), fmt::join(faults_, "\n  ")));
  for (const auto& adapter : adapters) check_base(*adapter, options.force);
  keep_tied_head();
  check_vocabulary();
  if (!options.original.empty()) open_trained(options);
}

void MergePlan::check_vocabulary() const {
  if (vocabulary == 0) return;
  for (const auto& output : outputs)
    if ((output.spec.name == std::string(kHead) + ".weight" ||
         layout.is_word_table(output.spec.name)) &&
        output.spec.shape[0] != vocabulary)
      throw Error("merge_files", fmt::format("an adapter resizes the vocabulary to {} rows, and "
                                             "nothing to {}, which has {}",
                                             vocabulary, output.spec.name, output.spec.shape[0]));
}

// The numbers of the model where an adapter has sampled its base; no values when it has no such
// weight.
WeightSample MergePlan::sample_of(const WeightSample& like) {
  WeightSample sample{.path = like.path};
  const auto* tensor = layout.find(like.path + ".weight");
  if (tensor == nullptr && like.path == kHead) tensor = layout.tied_table();
  if (tensor == nullptr || tensor->shape.size() != 2) return sample;
  sample.packed = base->packed(*tensor);
  sample.form = sample.packed ? "packed" : io::dtype_name(tensor->dtype);
  // A table's rows are sampled as they lie; what a module stores as [in, out] is turned.
  const bool turned = layout.stores_transposed(like.path);
  sample.out = tensor->shape[turned ? 1 : 0];
  sample.in = tensor->shape[turned ? 0 : 1];
  const auto rows = sample.packed ? base->open(*tensor) : nullptr;
  std::vector<float> row(static_cast<size_t>(tensor->shape[1]));
  size_t i = 0;
  for (auto [r, c] : sampled_places(like.path, sample.out, sample.in)) {
    if (turned) std::swap(r, c);
    if (rows) {
      rows->read(r, 1, row.data());
    } else {
      io::TensorInfo one{.name = tensor->name, .dtype = tensor->dtype, .shape = {1}};
      std::array<std::byte, sizeof(double)> bytes{};
      const auto width = tensor->bytes() / static_cast<uint64_t>(sample.out * sample.in);
      base->read(*tensor, static_cast<uint64_t>(r * tensor->shape[1] + c) * width, bytes.data(),
                 width);
      one.end = width;
      one.data = bytes.data();
      row[static_cast<size_t>(c)] = float_array(one).values[0];
    }
    sample.values[i++] = row[static_cast<size_t>(c)];
  }
  return sample;
}

void MergePlan::check_base(const AdapterFile& adapter, bool force) {
  const auto it = adapter.metadata().find(kBaseKey);
  if (it == adapter.metadata().end()) return;
  const auto trained = BaseFingerprint::from_json(it->second);
  BaseFingerprint some, found;
  const size_t step = std::max<size_t>(1, trained.weights.size() / kComparedWeights);
  for (size_t i = 0; i < trained.weights.size(); i += step) {
    const auto sample = sample_of(trained.weights[i]);
    if (sample.out == 0) continue;
    some.weights.push_back(trained.weights[i]);
    found.weights.push_back(sample);
  }
  const auto compared = compare(some, found);
  if (compared.match == BaseMatch::same) return;
  const auto away = fmt::format("their weights are {:.2g} of their size apart", compared.distance);
  const auto text =
      compared.match == BaseMatch::quantised_form
          ? fmt::format("{} was trained on a {} model, and {} holds the same weights as {}: {}",
                        adapter.folder().string(), compared.trained_form, base->path().string(),
                        compared.found_form, away)
          : fmt::format("{} was trained on another model than {}: {}", adapter.folder().string(),
                        base->path().string(), away);
  if (compared.match == BaseMatch::different && !force)
    throw Error("merge_files", text + ". Merge it into its own base, or force it");
  warnings.push_back(text);
}

// The quantised model, which must be one of the same tensors.
void MergePlan::open_trained(const MergeFilesOptions& options) {
  trained = open_merge_base(options.model);
  std::vector<std::string> others;
  bool packed = false;
  for (const auto* tensor : trained->tensors()) {
    packed |= trained->packed(*tensor);
    const auto* own = base->find(tensor->name);
    if (own == nullptr || own->shape != tensor->shape) others.push_back(tensor->name);
  }
  if (!packed)
    throw Error("merge_files", options.model.string() + " is not quantised: merge into it");
  if (!others.empty())
    throw Error(
        "merge_files",
        fmt::format("{} is not what {} was made of; these tensors differ: {}",
                    options.original.string(), options.model.string(), fmt::join(others, ", ")));
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
    if (output.transposed && !is_table && base->packed(*output.source)) {
      faults_.push_back(fmt::format("{} is packed, and stored as [in, out]", output.spec.name));
      continue;
    }
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
    if (output.rescaled || (term.scales.defined() && !output.edits.empty()))
      faults_.push_back(fmt::format("{}: PEQA's scales are merged alone", module));
    output.rescaled |= term.scales.defined();
    output.new_zeros |= term.zeros.defined();
    output.grouped = term.group > 0 && (output.edits.empty() || output.grouped);
    const bool additive = term.a.defined() && !term.gain.defined() && !term.magnitude.defined() &&
                          !term.input_gain.defined();
    output.additive &= additive;
    output.alone |= term.magnitude.defined();
    output.edits.push_back({&adapter, module, weight});
    if (!term.inner_bias.defined() && !term.gain.defined()) continue;
    if (auto* const bias = output_of(module + ".bias")) {
      bias->bias = true;
      bias->additive &= additive;
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
    if (is_resized(output, *tensor)) {
      output.spec.shape = tensor->shape;
      vocabulary = tensor->shape[0];
    }
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

// A token table, or the head over it, for a vocabulary of another size.
bool MergePlan::is_resized(const MergeOutput& output, const io::TensorInfo& tensor) const {
  const auto& shape = output.spec.shape;
  if (tensor.shape.size() != 2 || shape.size() != 2 || tensor.shape[1] != shape[1] ||
      tensor.shape[0] == shape[0])
    return false;
  const auto& name = output.spec.name;
  return name == std::string(kHead) + ".weight" || layout.is_word_table(name);
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
  const auto rules = adapter.config().target_rules();
  // With parameters alone there is no default for modules.
  if (!adapter.target_parameters().empty() && rules &&
      std::holds_alternative<std::monostate>(rules->target_modules))
    return;
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
  const auto head = of(name);
  if (head == outputs.end()) {
    if (changed->edits.empty() && changed->whole == nullptr) return;
    unties = true;
    outputs.push_back(
        {.spec = {name, dtype_of(dtype_, table->dtype), table->shape}, .source = table});
  } else if (const auto* a = head->whole, *b = changed->whole;
             a && b && head->edits.empty() && changed->edits.empty() && a->dtype == b->dtype &&
             a->shape == b->shape && std::equal(a->data, a->data + a->bytes(), b->data)) {
    outputs.erase(head);  // both were saved, and they are one
    unties = false;
    return;
  }
  of(name)->rows = rows;
}

}  // namespace budwood
