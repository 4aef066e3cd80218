#include "mirror.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <budwood/peft/config.h>
#include <budwood/peft/fold.h>
#include <budwood/peft/slot.h>

namespace py = pybind11;
using namespace budwood;

void Mirror::add(const std::string& path, const std::shared_ptr<torch::nn::Module>& slot) {
  torch::nn::Module* parent = this;
  size_t begin = 0;
  for (size_t dot = path.find('.'); dot != std::string::npos; dot = path.find('.', begin)) {
    const auto name = path.substr(begin, dot - begin);
    const auto children = parent->named_children();
    const auto* known = children.find(name);
    parent = known ? known->get()
                   : parent->register_module(name, std::make_shared<torch::nn::Module>()).get();
    begin = dot + 1;
  }
  parent->register_module(path.substr(begin), slot);
}

namespace {

std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

Sequences sequences_of(const py::dict& layout) {
  Sequences s;
  s.cu = layout["cu"].cast<std::vector<int64_t>>();
  s.prompt = layout["prompt"].cast<std::vector<int64_t>>();
  s.padding = layout["padding"].cast<std::vector<int64_t>>();
  if (layout.contains("tokens")) s.tokens = layout["tokens"].cast<std::vector<int64_t>>();
  s.from_start = layout["from_start"].cast<bool>();
  return s;
}

// A Python function that may be called while the interpreter's lock is not held.
std::function<at::Tensor(const at::Tensor&)> on_tensors(const py::object& function) {
  if (function.is_none()) return {};
  return [&function](const at::Tensor& x) {
    py::gil_scoped_acquire gil;
    return function(x).cast<at::Tensor>();
  };
}

LinearTerm term_of(const py::dict& d) {
  LinearTerm term;
  term.a = d["a"].cast<at::Tensor>();
  term.b = d["b"].cast<at::Tensor>();
  term.scaling = d["scaling"].cast<double>();
  term.dropout = d["dropout"].cast<double>();
  if (!d["bias"].is_none()) term.inner_bias = d["bias"].cast<at::Tensor>();
  return term;
}

std::vector<LinearTerm> terms_of(const py::list& list) {
  std::vector<LinearTerm> terms;
  for (const auto& item : list) terms.push_back(term_of(item.cast<py::dict>()));
  return terms;
}

std::vector<LinearTerm> merged_terms(const LinearSlotImpl& slot, const py::list& first,
                                     const std::vector<std::string>& names) {
  auto terms = terms_of(first);
  for (auto& term : slot.terms_to_merge(names)) terms.push_back(std::move(term));
  return terms;
}

void bind_adapter(py::module_& m) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(m, "Adapter", "What is trained at one place.")
      .def_property_readonly("config", [](const Adapter& a) { return a.config()->clone(); })
      .def_property_readonly("kind", [](const Adapter& a) { return slot_kind_name(a.kind()); })
      .def_property_readonly("rank", &Adapter::rank)
      .def_property_readonly("starts_as_identity", &Adapter::starts_as_identity)
      .def_property("weight", &Adapter::weight, &Adapter::set_weight)
      .def(
          "named_parameters",
          [](Adapter& a) {
            std::vector<std::pair<std::string, at::Tensor>> all;
            for (const auto& item : a.named_parameters())
              all.emplace_back(item.key(), item.value());
            return all;
          },
          "Its tensors by name; those of a shared table at the first place only.")
      .def("named_buffers",
           [](Adapter& a) {
             std::vector<std::pair<std::string, at::Tensor>> all;
             for (const auto& item : a.named_buffers()) all.emplace_back(item.key(), item.value());
             return all;
           })
      .def("trained", &Adapter::trained, "The tensors among them that are trained.")
      .def("composes", &Adapter::composes)
      .def("companion", &Adapter::companion)
      .def("state", &Adapter::state, "Tensors to save below the place's path.")
      .def("shared_state", &Adapter::shared_state)
      .def("private_state", &Adapter::private_state)
      .def("loaded", &Adapter::loaded, py::arg("found"))
      .def(
          "train", [](Adapter& a, bool on) { a.train(on); }, py::arg("mode") = true);
}

void bind_slots(py::module_& m) {
  py::class_<Slot, std::shared_ptr<Slot>>(m, "Slot")
      .def_property_readonly("kind", [](const Slot& s) { return slot_kind_name(s.kind()); })
      .def("adapter_names", &Slot::adapter_names)
      .def("adapter", &Slot::adapter, py::arg("name"))
      .def("active", &Slot::active)
      .def("merged", &Slot::merged)
      .def("set_active", &Slot::set_active, py::arg("names"))
      .def(
          "set_composition",
          [](Slot& slot, const std::string& name) {
            slot.set_composition(budwood::composition_of(name));
          },
          py::arg("composition"))
      .def("detach", &Slot::detach, py::arg("name"))
      .def("set_adapters_enabled", &Slot::set_adapters_enabled, py::arg("enabled"));

  py::class_<LinearSlotImpl, Slot, std::shared_ptr<LinearSlotImpl>>(m, "LinearSlot")
      .def(
          "forward",
          [](const LinearSlotImpl& slot, const at::Tensor& x, const py::list& first) {
            auto terms = terms_of(first);
            py::gil_scoped_release released;
            return slot.forward_with(x, std::move(terms));
          },
          py::arg("x"), py::arg("first"))
      .def(
          "set_base",
          [](LinearSlotImpl& slot, std::vector<at::Tensor> parts, int64_t format, int64_t out,
             int64_t in, const std::optional<at::Tensor>& bias) {
            slot.replace_weight(quant::Weight::from_parts(std::move(parts), format, out, in));
            slot.replace_bias(bias.value_or(at::Tensor()));
          },
          py::arg("parts"), py::arg("format"), py::arg("out"), py::arg("in_"), py::arg("bias"))
      .def("weight_parts", [](const LinearSlotImpl& slot) { return slot.weight().parts; })
      .def("bias", [](const LinearSlotImpl& slot) { return if_defined(slot.bias()); })
      .def(
          "fold_rows",
          [](const LinearSlotImpl& slot, const at::Tensor& rows, int64_t begin,
             const py::list& first, const std::vector<std::string>& names) {
            at::NoGradGuard no_grad;
            return fold_rows(rows.to(at::kCPU).clone(at::MemoryFormat::Contiguous), begin,
                             merged_terms(slot, first, names));
          },
          py::arg("rows"), py::arg("begin"), py::arg("first"), py::arg("names"),
          "Rows of the base in fp64 with the terms `first` and those of the named adapters in "
          "them.")
      .def(
          "fold_bias",
          [](const LinearSlotImpl& slot, const py::list& first,
             const std::vector<std::string>& names) {
            at::NoGradGuard no_grad;
            return if_defined(fold_bias(slot.bias(), merged_terms(slot, first, names)));
          },
          py::arg("first"), py::arg("names"));

  m.def(
      "fold_rows",
      [](const at::Tensor& rows, int64_t begin, const py::list& terms) {
        at::NoGradGuard no_grad;
        return fold_rows(rows.to(at::kCPU).clone(at::MemoryFormat::Contiguous), begin,
                         terms_of(terms));
      },
      py::arg("rows"), py::arg("begin"), py::arg("terms"),
      "Rows [begin, begin + rows.size(0)) of a weight in fp64 with LoRA terms in them.");
  m.def(
      "rounded_once",
      [](const at::Tensor& values, const at::Tensor& like) {
        at::NoGradGuard no_grad;
        return rounded_once(values, like.scalar_type());
      },
      py::arg("values"), py::arg("like"),
      "fp64 values in the dtype of another tensor, each rounded once.");

  py::class_<EmbeddingSlotImpl, Slot, std::shared_ptr<EmbeddingSlotImpl>>(m, "EmbeddingSlot")
      .def("adapt", &EmbeddingSlotImpl::adapt, py::arg("ids"), py::arg("rows"),
           py::call_guard<py::gil_scoped_release>())
      .def("weight_parts", [](const EmbeddingSlotImpl& slot) { return slot.weight().parts; })
      .def("merge", &EmbeddingSlotImpl::merge, py::arg("names"),
           py::call_guard<py::gil_scoped_release>())
      .def("unmerge", &EmbeddingSlotImpl::unmerge);

  py::class_<InputSlotImpl, Slot, std::shared_ptr<InputSlotImpl>>(m, "InputSlot")
      .def("virtual_tokens", &InputSlotImpl::virtual_tokens)
      .def("among_embeddings", &InputSlotImpl::among_embeddings)
      .def(
          "insert",
          [](const InputSlotImpl& slot, const py::dict& layout) -> py::tuple {
            const auto inserted = slot.insert(sequences_of(layout));
            if (!inserted) return py::make_tuple(py::none(), py::none());
            return py::make_tuple(inserted->rows, inserted->cu);
          },
          py::arg("layout"),
          "(rows, cu) of the sequences with virtual tokens: a row's own number, "
          "or -1 - v.")
      .def("forward", &InputSlotImpl::forward, py::arg("embedded"), py::arg("rows"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<AttentionSlotImpl, Slot, std::shared_ptr<AttentionSlotImpl>>(m, "AttentionSlot")
      .def(
          "prefix",
          [](const AttentionSlotImpl& slot) {
            const auto kv = slot.prefix();
            return py::make_tuple(if_defined(kv.k), if_defined(kv.v));
          },
          "(keys, values), [T, kv_heads, head_dim] each, or (None, None).")
      .def("gates_prefix", &AttentionSlotImpl::gates_prefix)
      .def(
          "gated_prefix",
          [](const AttentionSlotImpl& slot, const at::Tensor& hidden, const py::dict& layout) {
            const auto kv = slot.prefix(hidden, sequences_of(layout));
            return py::make_tuple(if_defined(kv.k), if_defined(kv.v));
          },
          py::arg("hidden"), py::arg("layout"),
          "The same [sequences, T, kv_heads, head_dim], times the gates of hidden states.")
      .def("position_shift", &AttentionSlotImpl::position_shift)
      .def("has_active", &AttentionSlotImpl::has_active)
      .def_property_readonly("head_dim", &AttentionSlotImpl::head_dim)
      .def(
          "beside",
          [](const AttentionSlotImpl& slot, const at::Tensor& attended, const at::Tensor& q,
             double scale, const py::function& project) {
            const auto keys_and_values = [&project](const at::Tensor& hidden) -> KeyValues {
              py::gil_scoped_acquire gil;
              auto [k, v] = project(hidden).cast<std::pair<at::Tensor, at::Tensor>>();
              return {k, v};
            };
            py::gil_scoped_release released;
            return slot.beside(attended, {q, scale, keys_and_values});
          },
          py::arg("attended"), py::arg("q"), py::arg("scale"), py::arg("project"));

  py::class_<BlockSlotImpl, Slot, std::shared_ptr<BlockSlotImpl>>(m, "BlockSlot")
      .def(
          "adapt",
          [](const BlockSlotImpl& slot, const at::Tensor& h, const at::Tensor& x,
             const py::object& norm, const py::dict& layout) {
            const auto sequences = sequences_of(layout);
            const auto apply = on_tensors(norm);
            py::gil_scoped_release released;
            return slot.adapt(h, x, apply, sequences);
          },
          py::arg("h"), py::arg("x"), py::arg("norm"), py::arg("layout"))
      .def(
          "edit",
          [](const BlockSlotImpl& slot, const at::Tensor& stream, const py::dict& layout) {
            const auto sequences = sequences_of(layout);
            py::gil_scoped_release released;
            return slot.edit(stream, sequences);
          },
          py::arg("stream"), py::arg("layout"));
}

template <class Made, class... Arguments>
std::shared_ptr<Made> put(Mirror& mirror, const std::string& path, Arguments&&... arguments) {
  auto slot = std::make_shared<Made>(std::forward<Arguments>(arguments)...);
  mirror.add(path, slot);
  return slot;
}

}  // namespace

void bind_mirror(py::module_& m) {
  bind_adapter(m);
  bind_slots(m);
  py::class_<Mirror, std::shared_ptr<Mirror>>(
      m, "Mirror",
      "The slots of a Python model; inject() and the rest take it as they take a model.")
      .def(py::init<std::string, std::string>(), py::arg("model_type"), py::arg("output_embedding"))
      .def(
          "add_linear",
          [](Mirror& mirror, const std::string& path, std::vector<at::Tensor> parts, int64_t format,
             int64_t out, int64_t in, const std::optional<at::Tensor>& bias) {
            return put<LinearSlotImpl>(mirror, path,
                                       quant::Weight::from_parts(std::move(parts), format, out, in),
                                       bias.value_or(at::Tensor()));
          },
          py::arg("path"), py::arg("parts"), py::arg("format"), py::arg("out"), py::arg("in_"),
          py::arg("bias"))
      .def(
          "add_embedding",
          [](Mirror& mirror, const std::string& path, const at::Tensor& table) {
            return put<EmbeddingSlotImpl>(mirror, path, quant::Weight::dense(table));
          },
          py::arg("path"), py::arg("table"))
      .def(
          "add_input",
          [](Mirror& mirror, const std::string& path, int64_t vocabulary, int64_t hidden) {
            return put<InputSlotImpl>(mirror, path, vocabulary, hidden);
          },
          py::arg("path"), py::arg("vocabulary"), py::arg("hidden"))
      .def(
          "add_attention",
          [](Mirror& mirror, const std::string& path, int64_t layer, int64_t heads,
             int64_t kv_heads, int64_t head_dim, int64_t hidden) {
            return put<AttentionSlotImpl>(mirror, path, layer, heads, kv_heads, head_dim, hidden);
          },
          py::arg("path"), py::arg("layer"), py::arg("heads"), py::arg("kv_heads"),
          py::arg("head_dim"), py::arg("hidden"))
      .def(
          "add_block",
          [](Mirror& mirror, const std::string& path, const std::string& part, int64_t layer,
             int64_t hidden) { return put<BlockSlotImpl>(mirror, path, part, layer, hidden); },
          py::arg("path"), py::arg("part"), py::arg("layer"), py::arg("hidden"))
      .def("add_container",
           [](Mirror& mirror, const std::string& path) {
             mirror.add(path, std::make_shared<torch::nn::Module>());
           })
      .def(
          "train", [](Mirror& mirror, bool on) { mirror.train(on); }, py::arg("mode") = true);
}
