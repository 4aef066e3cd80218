#include "tiny.h"

#include <budwood/peft/train/run_folder.h>
#include <budwood/peft/train/signals.h>
#include <budwood/peft/train/trainer.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

using namespace budwood;
using namespace budwood::train;
using namespace budwood::train::testing;
namespace fs = std::filesystem;

namespace {

TrainOptions quick() {
  TrainOptions o;
  o.steps = 8;
  o.batch_size = 3;
  o.sequence_length = 12;
  o.packing = "none";
  o.learning_rate = 1e-2;
  o.log_every = 1;
  return o;
}

// Runs with fresh model and trainer and returns what was learnt.
at::Tensor result_of(const TrainOptions& options, std::shared_ptr<Dataset> data,
                     double dropout = 0.0) {
  const auto model = tiny_model(dropout);
  Trainer(model, std::move(data), nullptr, options).run();
  return trained(*model);
}

std::vector<nlohmann::json> metrics(const fs::path& output) {
  std::vector<nlohmann::json> lines;
  std::istringstream text(io::read_file(output / "metrics.jsonl"));
  for (std::string line; std::getline(text, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

}  // namespace

TEST_CASE("activations kept in bf16 leave losses as they are and gradients nearly so") {
  const auto data = std::make_shared<Rows>(
      std::vector<std::vector<uint32_t>>(12, {1, 5, 2, 7, 3, 9, 4, 2, 8, 6}));
  auto options = quick();
  options.steps = 2;
  std::vector<double> losses;
  std::vector<at::Tensor> learnt;
  for (const char* dtype : {"float32", "bfloat16"}) {
    options.activation_dtype = dtype;
    const auto model = tiny_model();
    Trainer trainer(model, data, nullptr, options);
    trainer.on_log = [&](const StepMetrics& m) { losses.push_back(m.loss); };
    trainer.run();
    learnt.push_back(trained(*model));
  }
  CHECK(losses[0] == losses[2]);  // of the first step
  CHECK(losses[1] == doctest::Approx(losses[3]).epsilon(1e-2));
  CHECK_FALSE(torch::equal(learnt[0], learnt[1]));
  CHECK(((learnt[0] - learnt[1]).norm() / learnt[0].norm()).item<double>() < 0.05);
  options.activation_dtype = "float16";
  CHECK_THROWS_WITH_AS(options.validate(), doctest::Contains("activation_dtype"), Error);
}

TEST_CASE("training lowers the loss on data that can be learnt and leaves the base alone") {
  std::vector<std::vector<uint32_t>> ids(20, {1, 5, 2, 7, 3, 9, 4});
  auto options = quick();
  options.steps = 60;
  options.learning_rate = 5e-2;
  const auto model = tiny_model();
  const auto base = base_fingerprint(*model);
  Trainer trainer(model, std::make_shared<Rows>(ids), std::make_shared<Rows>(ids), options);
  const auto before = trainer.evaluate();
  const auto result = trainer.run();
  CHECK(result.steps == 60);
  CHECK_FALSE(result.interrupted);
  CHECK(result.final_loss < 0.5 * before.loss);
  CHECK(result.evaluation->loss < 0.5 * before.loss);
  CHECK(result.best->loss == result.evaluation->loss);
  CHECK(base_fingerprint(*model) == base);
}

TEST_CASE("accumulated batches equal one big batch on ragged rows, also with a partial last step") {
  const auto data = random_rows(26, 11);
  auto big = quick(), small = quick();
  for (auto* o : {&big, &small}) {
    o->steps = 0;
    o->epochs = 2;
  }
  big.batch_size = 8;
  small.batch_size = 1;
  small.grad_accumulation = 8;
  const auto a = result_of(big, data), b = result_of(small, data);
  CHECK((a - b).norm().item<double>() < 2e-6 * a.norm().item<double>());
}

TEST_CASE("packed windows equal separate rows") {
  const auto data = random_rows(24, 7);
  auto separate = quick(), packed = quick();
  separate.batch_size = packed.batch_size = 100;  // all rows in one step, whatever their order
  packed.packing = "pack";
  packed.sequence_length = 20;
  const auto a = result_of(separate, data), b = result_of(packed, data);
  CHECK((a - b).norm().item<double>() < 2e-6 * a.norm().item<double>());
}

TEST_CASE("a step equals torch's AdamW on the mean loss over counted tokens, clipped once") {
  const auto data = random_rows(9, 10);
  auto options = quick();
  options.steps = 3;
  options.batch_size = 3;
  options.grad_accumulation = 3;
  options.shuffle = false;
  options.schedule = "linear";
  options.max_grad_norm = 0.1;
  const auto ours = result_of(options, data);

  const auto model = tiny_model();
  model->train();
  NamedTensors named;
  for (auto& item : trainable_parameters(*model)) named.push_back(item);
  optim::Optimizer optimizer(named, optim::make_rule("adamw", {}));
  Sampler sampler(data, {12, 100, "none", "truncate", false});
  for (int step = 0; step < 3; ++step) {
    const auto batch = sampler.next();
    const auto logits = model->logits(model->hidden(batch.tokens, nullptr));
    at::cross_entropy_loss(logits, batch.labels, {}, at::Reduction::Mean, -100).backward();
    optim::clip_gradients(named, 0.1);
    optimizer.step(1e-2 * (3 - step) / 3);
    optimizer.zero_grad();
  }
  CHECK((trained(*model) - ours).norm().item<double>() < 2e-6 * ours.norm().item<double>());
}

TEST_CASE("a stopped and resumed run gives the same bytes, wherever it was stopped") {
  const auto data = random_rows(10, 11);
  auto options = quick();
  options.steps = 12;  // three epochs and a bit, so that stops fall into all of them
  options.grad_accumulation = 2;
  options.eval_every = 3;
  options.log_every = 2;
  const double dropout = 0.3;
  {
    const TemporaryFolder folder;
    options.output = (folder / "whole").string();
    const auto whole_model = tiny_model(dropout);
    const auto whole = Trainer(whole_model, data, data, options).run();
    for (const int64_t stop : {1, 3, 4, 7, 11}) {
      CAPTURE(stop);
      auto part = options;
      part.output = (folder / ("part" + std::to_string(stop))).string();
      part.resume = "auto";
      part.log_every = 1;  // so that the callback sees every step
      {
        Trainer first(tiny_model(dropout), data, data, part);
        first.on_log = [&](const StepMetrics& m) {
          if (m.step == stop) first.request_stop();
        };
        const auto result = first.run();
        CHECK(result.interrupted);
        CHECK(result.steps == stop);
      }
      at::manual_seed(999);  // whatever another program did in between
      part.log_every = 2;
      const auto model = tiny_model(dropout);
      Trainer second(model, data, data, part);
      CHECK(second.step() == stop);
      const auto result = second.run();
      CHECK_FALSE(result.interrupted);
      CHECK(trained(*model).equal(trained(*whole_model)));
      CHECK(result.best->step == whole.best->step);
      CHECK(result.best->loss == whole.best->loss);
      for (const char* file :
           {"adapter_model.safetensors", "adapter_config.json", "best/adapter_model.safetensors"})
        CHECK((io::read_file(fs::path(part.output) / file) ==
               io::read_file(fs::path(options.output) / file)));
    }
  }
}

TEST_CASE("a stop in the middle of an accumulated step is as if the step had not begun") {
  const auto data = random_rows(30, 11);
  auto options = quick();
  options.grad_accumulation = 4;
  options.batch_size = 1;
  const auto whole = result_of(options, data, 0.4);
  const auto model = tiny_model(0.4);
  Trainer trainer(model, data, nullptr, options);
  std::atomic<int> done = 0;
  trainer.on_log = [&](const StepMetrics& m) { done = static_cast<int>(m.step); };
  std::thread stopper([&] {
    while (done < 3) std::this_thread::yield();
    trainer.request_stop();
  });
  auto result = trainer.run();
  stopper.join();
  while (result.interrupted) result = trainer.run();
  CHECK(result.steps == 8);
  CHECK(trained(*model).equal(whole));
}

// The options of the run that is killed again and again.
TrainOptions killed_run(const fs::path& output) {
  auto options = quick();
  options.steps = 40;
  options.save_every = 1;
  options.eval_every = 5;
  options.output = output.string();
  options.resume = "auto";
  return options;
}

// A process of its own: a fork of this one would inherit torch's threads half dead.
TEST_CASE("the run of the process that is killed" * doctest::skip()) {
  const auto data = random_rows(10, 11);
  Trainer(tiny_model(0.2), data, data, killed_run(::getenv("BUDWOOD_TEST_OUTPUT"))).run();
}

TEST_CASE("a run that is killed at any moment and resumed ends in the same bytes") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  const fs::path whole = folder / "whole", killed = folder / "killed";
  Trainer(tiny_model(0.2), data, data, killed_run(whole)).run();

  ::setenv("BUDWOOD_TEST_OUTPUT", killed.c_str(), 1);
  std::mt19937 random(3);
  int kills = 0, code = -1;
  const auto newest = [&] {
    const auto all = list_checkpoints(killed);
    return all.empty() ? 0 : all.back().first;
  };
  while (code < 0 && kills < 40) {
    const auto goal = newest() + 1 + static_cast<int64_t>(random() % 8);
    const pid_t child = ::fork();
    if (child == 0) {
      ::execl("/proc/self/exe", "test", "--no-skip", "-m",
              "-tc=the run of the process that is killed", static_cast<char*>(nullptr));
      ::_exit(127);
    }
    int status = 0;
    while (::waitpid(child, &status, WNOHANG) == 0) {
      if (newest() < goal) {
        ::usleep(500);
        continue;
      }
      // Somewhere within the following step, its evaluation or its save.
      ::usleep(static_cast<useconds_t>(random() % 60000));
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      break;
    }
    if (WIFEXITED(status))
      code = WEXITSTATUS(status);
    else
      ++kills;
  }
  REQUIRE(code == 0);
  CHECK(kills > 3);
  for (const char* file : {"adapter_model.safetensors", "best/adapter_model.safetensors"})
    CHECK((io::read_file(whole / file) == io::read_file(killed / file)));
  // No metrics twice, none missing, and the same numbers.
  const auto a = metrics(whole), b = metrics(killed);
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i)
    for (const char* key : {"step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens"})
      if (a[i].contains(key)) CHECK(a[i][key].dump() == b[i].value(key, nlohmann::json()).dump());
}

TEST_CASE(
    "the output folder holds adapter, options, metrics and as many checkpoints as asked for") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  auto options = quick();
  options.steps = 7;
  options.save_every = 2;
  options.keep_last = 2;
  options.eval_every = 3;
  options.log_every = 3;
  options.warmup_ratio = 0.3;
  options.output = (folder / "run").string();
  Trainer trainer(tiny_model(), data, data, options);
  int64_t logged = 0;
  trainer.on_log = [&](const StepMetrics& m) {
    ++logged;
    CHECK(m.total_steps == 7);
    CHECK(m.tokens > 0);
    CHECK(m.peak_rss_mb > 1);
    CHECK(std::isfinite(m.eta_seconds));
  };
  trainer.run();
  CHECK(logged == 3);
  const fs::path out = options.output;
  const auto checkpoints = list_checkpoints(out);
  REQUIRE(checkpoints.size() == 2);
  CHECK(checkpoints[0].first == 6);
  CHECK(checkpoints[1].first == 7);
  CHECK(fs::exists(out / "adapter_config.json"));
  CHECK((io::read_file(out / "adapter_model.safetensors") ==
         io::read_file(checkpoints[1].second / "adapter_model.safetensors")));
  CHECK(fs::exists(out / "best/evaluation.json"));
  const auto resolved = TrainOptions::from_json(io::read_file(out / "training.json"));
  CHECK(resolved.steps == 7);
  CHECK(resolved.warmup_steps == 3);
  std::vector<int64_t> steps, evaluated;
  for (const auto& line : metrics(out))
    (line.contains("eval_loss") ? evaluated : steps).push_back(line["step"]);
  CHECK(steps == std::vector<int64_t>{3, 6, 7});
  CHECK(evaluated == std::vector<int64_t>{3, 6, 7});
  // The adapter in the folder is the trained one.
  auto model = std::make_shared<TinyLM>();
  load_adapter(*model, options.output);
  CHECK(trained(*model).numel() > 0);
}

TEST_CASE("a finished run that is resumed changes nothing") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  auto options = quick();
  options.save_every = 4;
  options.eval_every = 4;
  options.output = (folder / "run").string();
  options.resume = "auto";
  Trainer(tiny_model(), data, data, options).run();
  const auto before = io::read_file(folder / "run/adapter_model.safetensors");
  const auto lines = metrics(options.output).size();
  for (int i = 0; i < 2; ++i) {
    const auto result = Trainer(tiny_model(), data, data, options).run();
    CHECK(result.steps == 8);
    CHECK(result.evaluation.has_value());
    CHECK(metrics(options.output).size() == lines);
    CHECK((io::read_file(folder / "run/adapter_model.safetensors") == before));
  }
}

TEST_CASE("an earlier run is neither overwritten nor mixed with, unless asked for") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  auto options = quick();
  options.save_every = 4;
  options.output = (folder / "run").string();
  Trainer(tiny_model(), data, nullptr, options).run();
  CHECK(contains(message_of([&] { Trainer(tiny_model(), data, nullptr, options).run(); }),
                 "holds an earlier run (checkpoint-8)"));
  io::write_file(fs::path(options.output) / "notes.txt", "mine");
  options.overwrite = true;
  options.steps = 2;
  Trainer(tiny_model(), data, nullptr, options).run();
  CHECK(metrics(options.output).size() == 2);
  CHECK(list_checkpoints(options.output).size() == 1);
  CHECK(fs::exists(fs::path(options.output) / "notes.txt"));
}

TEST_CASE("a checkpoint of another run is refused, and what differs is named") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  auto options = quick();
  options.save_every = 4;
  options.output = (folder / "run").string();
  Trainer(tiny_model(), data, nullptr, options).run();
  options.resume = (folder / "run/checkpoint-4").string();
  options.output = (folder / "second").string();
  const auto refused = [&](std::shared_ptr<TinyLM> model, std::shared_ptr<Dataset> rows,
                           TrainOptions o) {
    return message_of([&] { Trainer(model, rows, nullptr, o); });
  };
  CHECK(refused(tiny_model(), data, options).empty());
  auto other = options;
  other.learning_rate = 5e-3;
  other.batch_size = 2;
  CHECK(contains(refused(tiny_model(), data, other),
                 "batch_size was 3, now 2; learning_rate was 0.01, now 0.005"));
  CHECK(contains(refused(tiny_model(), random_rows(10, 11, 7), options), "training data"));
  auto changed = tiny_model();
  {
    at::NoGradGuard no_grad;
    changed->named_parameters()["head"].mul_(2);
  }
  CHECK(contains(refused(changed, data, options), "frozen weights"));
  auto unadapted = tiny_model();
  for (auto& p : unadapted->named_modules()["out"]->parameters()) p.set_requires_grad(false);
  CHECK_FALSE(refused(unadapted, data, options).empty());
  fs::remove(folder / "run/checkpoint-4/state.safetensors");
  CHECK(contains(refused(tiny_model(), data, options), "checkpoint-4"));
  options.resume = (folder / "nowhere").string();
  CHECK(contains(refused(tiny_model(), data, options), "nowhere"));
}

TEST_CASE("a loss that is not finite ends the run, names the step and leaves the adapter whole") {
  const auto data = random_rows(10, 11);
  const TemporaryFolder folder;
  auto options = quick();
  options.save_every = 2;
  options.output = (folder / "run").string();
  const auto model = tiny_model();
  Trainer trainer(model, data, nullptr, options);
  at::Tensor after;
  trainer.on_log = [&](const StepMetrics& m) {
    if (m.step != 5) return;
    after = trained(*model);
    at::NoGradGuard no_grad;
    model->named_parameters()["head"].fill_(std::nanf(""));
  };
  const auto message = message_of([&] { trainer.run(); });
  CHECK(contains(message, "step 6: the loss is nan"));
  CHECK(contains(message, "checkpoint-4"));
  CHECK(trained(*model).equal(after));
  CHECK(message_of([&] { load_checkpoint(folder / "run/checkpoint-4"); }).empty());
}

TEST_CASE("what would fail later fails before the first step") {
  const auto data = random_rows(10, 11);
  const auto refused = [&](std::shared_ptr<models::CausalLM> model, std::shared_ptr<Dataset> rows,
                           TrainOptions options) {
    return message_of([&] { Trainer(model, rows, nullptr, options); });
  };
  CHECK(contains(refused(nullptr, data, quick()), "no model"));
  auto bare = std::make_shared<TinyLM>();
  CHECK(contains(refused(bare, data, quick()), "inject an adapter first"));
  const auto big = std::make_shared<Rows>(std::vector<std::vector<uint32_t>>{{1, 2}, {3, 40}});
  CHECK(contains(refused(tiny_model(), big, quick()), "row 1, position 1: token id 40"));
  const auto longer = random_rows(3, 2000, 2);
  auto options = quick();
  options.sequence_length = 2000;
  CHECK(contains(refused(tiny_model(), longer, options), "at most 512"));
  options = quick();
  options.eval_every = 2;
  CHECK(contains(refused(tiny_model(), data, options), "no evaluation data"));
  options = quick();
  options.output = "/tmp/x";
  options.adapter = "other";
  CHECK(contains(refused(tiny_model(), data, options), "no adapter named 'other'"));
  auto unused = tiny_model();
  unused->register_parameter("unused", at::zeros({2, 2}));
  CHECK(contains(message_of([&] { Trainer(unused, data, nullptr, quick()).run(); }),
                 "got no gradient, the first is unused"));
}

TEST_CASE("the caller's random numbers go on as if nobody had trained") {
  at::manual_seed(4);
  const auto expected = at::rand({3});
  at::manual_seed(4);
  result_of(quick(), random_rows(10, 11), 0.5);
  CHECK(at::rand({3}).equal(expected));
}

TEST_CASE("a signal makes the run write a checkpoint and return; handlers come back") {
  const auto data = random_rows(10, 11);
  for (const int number : {SIGINT, SIGTERM}) {
    const TemporaryFolder folder;
    auto options = quick();
    options.steps = 100000;
    options.output = (folder / "run").string();
    struct sigaction before = {}, after = {};
    ::sigaction(number, nullptr, &before);
    {
      const StopOnSignal signals;
      Trainer trainer(tiny_model(), data, nullptr, options);
      trainer.on_log = [&](const StepMetrics& m) {
        if (m.step == 3) ::raise(number);
      };
      const auto result = trainer.run();
      CHECK(result.interrupted);
      CHECK(result.steps == 3);
      CHECK(StopOnSignal::received() == number);
    }
    CHECK(load_checkpoint(folder / "run/checkpoint-3").state.step == 3);
    ::sigaction(number, nullptr, &after);
    CHECK((after.sa_handler == before.sa_handler));
  }
}

TEST_CASE("the second signal ends the process") {
  const pid_t child = ::fork();
  if (child == 0) {
    const StopOnSignal signals;
    ::raise(SIGTERM);
    ::raise(SIGTERM);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGTERM);
}

TEST_CASE("an exception from a callback comes out of run and leaves the trainer usable") {
  const auto data = random_rows(10, 11);
  const auto whole = result_of(quick(), data, 0.3);
  const auto model = tiny_model(0.3);
  Trainer trainer(model, data, nullptr, quick());
  trainer.on_log = [](const StepMetrics& m) {
    if (m.step == 4) throw std::runtime_error("enough");
  };
  CHECK_THROWS_AS(trainer.run(), std::runtime_error);
  trainer.on_log = nullptr;
  CHECK(trainer.run().steps == 8);
  CHECK(trained(*model).equal(whole));
}
