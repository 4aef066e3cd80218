"""The verbs and their options. What they do stands in a module of the same name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Exit, Option

# The class of all usage errors, which typer has moved between its releases.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="budwood",
    help="Fine-tune language models by training a small adapter and leaving the model frozen.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Model = Annotated[
    str, Option("--model", "-m", metavar="PATH", help="Hugging Face folder or GGUF file.")
]
Tokenizer = Annotated[
    str | None,
    Option(
        metavar="PATH", help="Folder or GGUF file of the tokeniser.", show_default="the model's"
    ),
]
Dtype = Annotated[str, Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None,
    Option(
        metavar="FORM",
        help="Pack the weights while loading: nf4, fp4, int8, int4 or affine8.",
        show_default="as they are",
    ),
]
Adapters = Annotated[
    list[str] | None, Option("--adapter", "-a", metavar="PATH", help="Adapter folder.")
]
Json = Annotated[bool, Option("--json", help="Print the figures as one JSON object.")]
Form = Annotated[str, Option("--format", metavar="FORM", help="auto (by suffix), text or jsonl.")]
Bos = Annotated[
    bool | None,
    Option("--bos/--no-bos", help="Begin-of-sequence token.", show_default="as the tokeniser does"),
]
Eos = Annotated[bool, Option("--eos/--no-eos", help="End text and completions with the end token.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from .version import version_lines

        print("\n".join(version_lines()))
        raise Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Versions of budwood and torch, and the instruction set in use.",
        ),
    ] = False,
    debug: Annotated[
        bool, Option("--debug", help="Show where in the program an error arose.")
    ] = False,
) -> None:
    if debug:
        os.environ["BUDWOOD_DEBUG"] = "1"


@app.command()
def train(
    config: Annotated[Path, Argument(metavar="CONFIG", help="YAML or JSON file.")],
    overrides: Annotated[
        list[str] | None,
        Argument(metavar="KEY=VALUE", help="Settings that replace the file's."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    plot: Annotated[bool, Option("--plot", help="Draw the loss curve as loss.png.")] = False,
    json: Json = False,
) -> None:
    """Train an adapter on text, JSON lines or a token file.

    CONFIG has these settings; model, output and data.train are required:

    \b
      model, tokenizer, dtype, seed, output
      weights:  auto, packed or dense: whether a GGUF's blocks, or a folder's 16-bit matrices,
                are used as they lie in the file
      quantize: nf4, fp4, int8, int4; or format, block_size, double_quant, skip
      data:     train, eval, format, sequence_length, packing, long_rows, shuffle, bos, eos
      adapter:  method (lora), name, r, lora_alpha, target_modules, lora_dropout, ...
      train:    steps or epochs, batch_size, grad_accumulation, learning_rate, schedule,
                warmup_steps, gradient_checkpointing, eval_every, save_every, log_every, ...

    \b
    For example:
      budwood train run.yaml adapter.r=32 train.learning_rate=1e-4

    The output folder receives the adapter in HF PEFT's layout, config.yaml with the settings as
    used, metrics.jsonl and checkpoints. Ctrl-C writes a checkpoint.
    """
    from . import train as verb

    status = verb.run(
        config, overrides or [], resume=resume, overwrite=overwrite, plot=plot, as_json=json
    )
    if status != 0:
        raise Exit(status)


@app.command("eval")
def evaluate(
    data: Annotated[Path, Argument(metavar="DATA", help="Text, folder, JSON lines or token file.")],
    model: Model,
    adapter: Adapters = None,
    sequence_length: Annotated[
        int,
        Option(metavar="N", min=1, help="Longer rows are cut into windows of this many tokens."),
    ] = 1024,
    form: Form = "auto",
    bos: Bos = None,
    eos: Eos = True,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Measure loss and perplexity on text, with or without an adapter.

    Every counted token is predicted exactly once, from what stands before it in its window. The
    standard error is over windows.
    """
    from . import evaluate as verb

    verb.run(
        data,
        model=model,
        adapters=adapter or [],
        sequence_length=sequence_length,
        form=form,
        bos=bos,
        eos=eos,
        tokenizer=tokenizer,
        dtype=dtype,
        quantize=quantize,
        as_json=json,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        Option(
            "--prompt", "-p", metavar="TEXT", help="To continue.", show_default="standard input"
        ),
    ] = None,
    adapter: Adapters = None,
    chat: Annotated[bool, Option("--chat", help="Ask through the model's chat template.")] = False,
    system: Annotated[
        str | None, Option(metavar="TEXT", help="System message, with --chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", "-n", metavar="N", min=1, help="At most so many.")
    ] = 256,
    temperature: Annotated[
        float, Option(metavar="X", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, Option(metavar="K", min=0, help="Draw among the k likeliest; 0 = all.")
    ] = 0,
    top_p: Annotated[
        float, Option(metavar="P", help="Draw among the fewest that hold this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, Option(metavar="X", help="Above 1 avoids what occurred.")
    ] = 1.0,
    seed: Annotated[int, Option(metavar="N", min=0, help="Of the draws.")] = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Continue a prompt or answer in a chat.

    The text appears as it is made. Without --prompt the prompt is read from standard input; with
    --chat on a terminal this becomes a conversation.
    """
    from . import generate as verb

    verb.run(
        prompt,
        model=model,
        adapters=adapter or [],
        chat=chat,
        system=system,
        sampling={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        tokenizer=tokenizer,
        dtype=dtype,
        quantize=quantize,
        as_json=json,
    )


@app.command()
def merge(
    model: Model,
    adapter: Annotated[
        list[str], Option("--adapter", "-a", metavar="PATH", help="Adapter folder.")
    ],
    out: Annotated[
        Path, Option("--out", "-o", metavar="PATH", help="Folder, or file named *.gguf.")
    ],
    weight: Annotated[
        list[float] | None,
        Option("--weight", "-w", metavar="NUMBER", help="Weight of each adapter, in their order."),
    ] = None,
    into: Annotated[
        str,
        Option(
            metavar="TARGET",
            help="Of a quantised model: dequantised, requantised or original16.",
        ),
    ] = "dequantised",
    original: Annotated[
        Path | None, Option(metavar="FOLDER", help="The plain model, for original16.")
    ] = None,
    dtype: Annotated[
        str,
        Option(
            metavar="DTYPE",
            help="auto, float32, bfloat16, float16; in a GGUF also q8_0, q4_0, q4_1.",
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str, Option(metavar="SIZE", help="Largest file, as 5GB or 500MB.")
    ] = "5GB",
    jobs: Annotated[
        int, Option("--jobs", "-j", metavar="N", help="Threads; 0 = one for each processor.")
    ] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output.")] = False,
    force: Annotated[
        bool, Option("--force", help="Even where less than half of a change survives.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Go on where a killed merge stopped.")] = False,
    backup: Annotated[
        bool, Option("--backup", help="Keep the old weights in the folder, for unmerge.")
    ] = False,
    json: Json = False,
) -> None:
    """Fold adapters into a model and save it.

    The result is a folder that transformers opens, or a GGUF file. The tokeniser comes along.
    Several adapters may be given; their changes add up. The model is merged piece by piece, so it
    may be larger than memory, and merge_report.json says what rounding left of each change.
    """
    from . import merge as verb

    verb.run(
        model=model,
        adapters=adapter,
        weights=weight or [],
        out=out,
        into=into,
        original=original,
        dtype=dtype,
        max_shard_size=max_shard_size,
        jobs=jobs,
        overwrite=overwrite,
        force=force,
        resume=resume,
        backup=backup,
        as_json=json,
    )


@app.command()
def unmerge(
    model: Annotated[Path, Option("--model", "-m", metavar="FOLDER", help="The merged model.")],
    out: Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where the model goes.")],
    adapter: Annotated[
        list[str] | None,
        Option("--adapter", "-a", metavar="PATH", help="Adapter; not needed with a backup."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        Option("--weight", "-w", metavar="NUMBER", help="Weight of each adapter, in their order."),
    ] = None,
    base: Annotated[
        Path | None, Option(metavar="FOLDER", help="What they were merged into, if it is there.")
    ] = None,
    max_shard_size: Annotated[
        str, Option(metavar="SIZE", help="Largest file, as 5GB or 500MB.")
    ] = "5GB",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the folder.")] = False,
    json: Json = False,
) -> None:
    """Write a model as it was before a merge.

    Bit for bit from the backup that `merge --backup` keeps in the folder, or from the base. Without
    them the change of the adapters is subtracted, and what two roundings did stays.
    """
    from . import unmerge as verb

    verb.run(
        model=model,
        adapters=adapter or [],
        weights=weight or [],
        base=base,
        out=out,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def convert(
    adapter: Annotated[str, Argument(metavar="PATH", help="Adapter folder or GGUF file.")],
    to: Annotated[str, Option("--to", metavar="FORMAT", help="peft, adapterhub, mlx or gguf.")],
    out: Annotated[Path, Option("--out", "-o", metavar="PATH", help="Where the adapter goes.")],
    model: Annotated[
        str, Option("--model", "-m", metavar="PATH", help="The base, for gguf and adapterhub.")
    ] = "",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Write a LoRA adapter in another library's files.

    Reads HF PEFT, AdapterHub, MLX and llama.cpp's GGUF. Each consumer's rules are kept: what it has
    no scaling for is multiplied into B, rows are permuted as GGUF wants them, and what it cannot
    hold is an error that lists it.
    """
    from . import convert as verb

    verb.run(adapter=adapter, to=to, model=model, out=out, overwrite=overwrite, as_json=json)


@app.command()
def verify(
    model: Model,
    adapter: Annotated[
        list[str], Option("--adapter", "-a", metavar="PATH", help="Adapter folder.")
    ],
    merged: Annotated[Path, Option("--merged", metavar="FOLDER", help="The merged model.")],
    weight: Annotated[
        list[float] | None,
        Option("--weight", "-w", metavar="NUMBER", help="Weight of each adapter, in their order."),
    ] = None,
    tolerance: Annotated[
        float, Option(metavar="STEPS", help="Allowed distance, in steps of the dtype.")
    ] = 1.0,
    random_tokens: Annotated[
        int, Option(metavar="N", help="Tokens whose logits are compared; 0 = none.")
    ] = 16,
    tokens: Annotated[str | None, Option(metavar="IDS", help="Or: these, as 1,15,7.")] = None,
    logits_tolerance: Annotated[
        float, Option(metavar="PART", help="Allowed difference, over the largest logit.")
    ] = 0.02,
    json: Json = False,
) -> None:
    """Compare a merged model with what model and adapters make.

    Of each changed value the distance from the exact one is measured in steps between neighbouring
    numbers of its dtype: at most half a step when it was rounded once. What no adapter changes has
    to be the model's byte for byte. Then both models are run on some tokens. The exit status is 1
    above a tolerance.
    """
    from . import verify as verb

    passed = verb.run(
        model=model,
        adapters=adapter,
        weights=weight or [],
        merged=merged,
        tolerance=tolerance,
        tokens=tokens,
        random_tokens=random_tokens,
        logits_tolerance=logits_tolerance,
        as_json=json,
    )
    if not passed:
        raise Exit(1)


@app.command()
def extract(
    base: Annotated[Path, Option("--base", "-b", metavar="FOLDER", help="The original model.")],
    tuned: Annotated[Path, Option("--tuned", "-t", metavar="FOLDER", help="The tuned one.")],
    out: Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where the adapter goes.")],
    rank: Annotated[int, Option("--rank", "-r", metavar="R", help="Rank of every module.")] = 0,
    energy: Annotated[
        float, Option("--energy", metavar="E", help="Or: the part of each difference to keep.")
    ] = 0.0,
    target: Annotated[
        list[str] | None,
        Option("--target", metavar="NAME", help="Projections; all but the head by default."),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the folder.")] = False,
    json: Json = False,
) -> None:
    """Make a LoRA adapter from the difference of two models.

    The difference of each projection is cut to its leading singular triplets. What else differs
    between the models is listed.
    """
    from . import extract as verb

    verb.run(
        base=base,
        tuned=tuned,
        out=out,
        rank=rank,
        energy=energy,
        targets=target or [],
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def combine(
    adapter: Annotated[
        list[str], Option("--adapter", "-a", metavar="PATH", help="Adapter folder.")
    ],
    out: Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where the adapter goes.")],
    weight: Annotated[
        list[float] | None,
        Option("--weight", "-w", metavar="NUMBER", help="Weight of each adapter, in their order."),
    ] = None,
    mode: Annotated[
        str, Option(metavar="MODE", help="cat, svd, linear, ties, dare or dare_ties.")
    ] = "cat",
    rank: Annotated[
        int, Option("--rank", "-r", metavar="R", help="Of svd, ties, dare; 0 = the largest.")
    ] = 0,
    density: Annotated[
        float, Option(metavar="PART", help="Of ties and dare: entries that are kept.")
    ] = 0.5,
    seed: Annotated[int, Option(metavar="N", help="Of dare.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the folder.")] = False,
    json: Json = False,
) -> None:
    """Make one LoRA adapter of several.

    cat is exact and adds the ranks up; svd is the best approximation of a rank; linear, ties and
    dare change what they sum. The error of each against the weighted sum is printed.
    """
    from . import combine as verb

    verb.run(
        adapters=adapter,
        weights=weight or [],
        out=out,
        mode=mode,
        rank=rank,
        density=density,
        seed=seed,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def quantize(
    model: Model,
    out: Annotated[
        Path, Option("--out", "-o", metavar="PATH", help="Folder, or GGUF file, to write.")
    ],
    format: Annotated[
        str,
        Option(
            "--format",
            "-f",
            metavar="FORM",
            help="nf4, fp4, int8, int4; or for a GGUF file q4_0, q4_1, q8_0, f16, bf16, f32.",
        ),
    ] = "nf4",
    method: Annotated[
        str,
        Option(
            metavar="METHOD",
            help="rtn rounds to nearest; also gptq, except for a GGUF file; for int4 and int8 hqq "
            "and awq, too.",
        ),
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        Option(metavar="FILE", help="Text, JSON lines or token file, for gptq and awq."),
    ] = None,
    block_size: Annotated[
        int, Option(metavar="N", min=1, help="Numbers of a row that share a scale.")
    ] = 64,
    double_quant: Annotated[
        bool, Option("--double-quant", help="nf4 and fp4: pack the scales too.")
    ] = False,
    act_order: Annotated[
        bool, Option(help="gptq: begin with the columns of large activations.")
    ] = True,
    static_groups: Annotated[
        bool, Option(help="gptq: groups are runs of neighbouring columns also with --act-order.")
    ] = True,
    calibration_tokens: Annotated[
        int, Option(metavar="N", min=1, help="So many tokens of the calibration text are used.")
    ] = 8192,
    sequence_length: Annotated[
        int, Option(metavar="N", min=1, help="Longest calibration sequence.")
    ] = 512,
    skip: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="Leave matrices with this in their names plain; may be given again.",
            show_default="lm_head, embed, wte, wpe",
        ),
    ] = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    max_shard_size: Annotated[
        str, Option(metavar="SIZE", help="Largest file, as 5GB or 500MB.")
    ] = "5GB",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Pack a model's weights in 4 or 8 bits and save it.

    nf4, fp4 and int8 give a folder in bitsandbytes' layout, which transformers opens; int4, and
    int8 with hqq, gptq or awq, one in Budwood's own; q4_0, q4_1, q8_0, f16, bf16 and f32 a GGUF
    file for llama.cpp and its relatives. Memory holds what is packed already and one matrix; gptq
    and awq also hold the plain model and the activations of one block.

    \b
    For example:
      budwood quantize -m MODEL -f nf4 --double-quant -o MODEL-nf4
      budwood quantize -m MODEL -f int4 --method gptq --calibration text.txt -o MODEL-int4
      budwood quantize -m MODEL -f nf4 --method gptq --calibration text.txt -o MODEL-nf4
    """
    from . import quantize as verb
    from .merge import parse_size

    verb.run(
        model=model,
        out=out,
        format=format,
        method=method,
        calibration=calibration,
        options={
            "block_size": block_size,
            "double_quant": double_quant,
            "act_order": act_order,
            "static_groups": static_groups,
            "calibration_tokens": calibration_tokens,
            "sequence_length": sequence_length,
            "skip": skip or None,
            "dtype": dtype,
            "max_shard_size": parse_size("quantize", max_shard_size),
        },
        tokenizer=tokenizer,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def inspect(
    path: Annotated[str, Argument(metavar="PATH", help="Adapter, model, safetensors or GGUF.")],
    tensors: Annotated[bool, Option("--tensors", help="List every tensor.")] = False,
    plot: Annotated[
        Path | None,
        Option(metavar="FILE", help="Draw a heat map of an adapter's changes, .png or .svg."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a file or folder is: adapter, model, safetensors, GGUF."""
    from . import inspect as verb

    verb.run(path, tensors=tensors, plot=plot, as_json=json)


@app.command()
def tokenize(
    source: Annotated[Path, Argument(metavar="SOURCE", help="Text, folder or JSON lines.")],
    model: Annotated[
        str,
        Option("--model", "-m", metavar="PATH", help="Model or tokeniser: a folder or GGUF file."),
    ],
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="FILE", help="Token file.", show_default="only count"),
    ] = None,
    form: Form = "auto",
    sequence_length: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Count the rows that training with it would cut."),
    ] = None,
    bos: Bos = None,
    eos: Eos = True,
    show: Annotated[int, Option(metavar="N", min=0, help="Print N rows, targets marked.")] = 0,
    json: Json = False,
) -> None:
    """Turn text into a token file, and show what the loss will count.

    A text file is one row, a folder has one row for each file, and a line of JSON is one row:

    \b
      {"text": ...}                       the loss counts everything
      {"prompt": ..., "completion": ...}  the completion
      {"messages": [{"role": ..., "content": ...}, ...]}  the assistant's messages
    """
    from . import tokenize as verb

    verb.run(
        source,
        model=model,
        out=out,
        form=form,
        sequence_length=sequence_length,
        bos=bos,
        eos=eos,
        show=show,
        as_json=json,
    )


def run(arguments: list[str]) -> int:
    """Runs the command line; errors become one line and a status that is not 0."""
    try:
        status = app(args=arguments, prog_name="budwood", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("budwood: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone; keep Python from complaining while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("BUDWOOD_DEBUG"):
            raise
        print(f"budwood: {_message(error)}", file=sys.stderr)
        return 1


def _message(error: Exception) -> str:
    text = str(error).strip() or "no message"
    if type(error).__module__.split(".")[0] == "budwood" or isinstance(error, ImportError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (--debug shows where)"
