"""Arguments and options that several commands share, each defined once: its help, its panel, its type."""

from __future__ import annotations

from typing import Annotated

import typer

LAYERS, TEACHER, VALUES, OUTPUT, TALK = "Layers", "Teacher and settings", "Initial values", "Output", "Display"
PROBE = "Probe tokens"

TeacherArgument = Annotated[str, typer.Argument(help="Folder or Hub id (org/name@revision) of the teacher.")]
SourceArgument = Annotated[str, typer.Argument(help="Folder, .pth/.pt/.bin file or Hub id of the checkpoint.")]
OutFolder = Annotated[str, typer.Argument(help="Folder to create.")]
OutAny = Annotated[str, typer.Argument(help="Folder, or NAME.pth, to create.")]
OutPth = Annotated[str, typer.Argument(help="NAME.pth to create; NAME.json goes beside it.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.", rich_help_panel=TEACHER)]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", help="Folder or Hub id: completes attention-only checkpoints.", rich_help_panel=TEACHER),
]
LayerMapSettings = Annotated[
    str | None,
    typer.Option("--layer-map", help="Layer map that names rope_theta and eps.", rich_help_panel=TEACHER),
]
LayerMapChoice = Annotated[
    str | None,
    typer.Option(
        "--layer-map",
        help="Layer map (name or TOML file). Default: the teacher's shipped map, else evenly spaced.",
        rich_help_panel=LAYERS,
    ),
]
RopeTheta = Annotated[
    float | None, typer.Option(help="Where no file says it, or to override it.", rich_help_panel=TEACHER)
]
Eps = Annotated[float | None, typer.Option(help="Where no file says it, or to override it.", rich_help_panel=TEACHER)]
Tied = Annotated[
    bool | None,
    typer.Option(
        "--tie-word-embeddings/--no-tie-word-embeddings",
        help="Whether the head is the embedding, where no file says it.",
        rich_help_panel=TEACHER,
    ),
]
AllowLayer0 = Annotated[
    bool, typer.Option("--allow-gqa-layer-0", help="Accept layer 0 as GQA (loaders disagree).", rich_help_panel=LAYERS)
]
Preset = Annotated[
    str, typer.Option(help="openmose-stage1 (0.5 0.5 0.3 0.5) or openmose-stage2 (1.0).", rich_help_panel=VALUES)
]
Scale = Annotated[
    str | None, typer.Option(help="Factors over the preset: receptance=0.5,key=1,...", rich_help_panel=VALUES)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random matrices.", rich_help_panel=VALUES)]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: as in the source.", rich_help_panel=OUTPUT),
]
MaxShard = Annotated[str, typer.Option(help="Largest file of an hf folder: 5GB, 500MB, 4GiB.", rich_help_panel=OUTPUT)]
CopyCode = Annotated[
    bool, typer.Option("--copy-code", help="Copy .py files of the source too.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.", rich_help_panel=OUTPUT)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT)]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the check of what was written.", rich_help_panel=OUTPUT)
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads. Default: 2, or 1 on one core.", rich_help_panel=OUTPUT)
]
Digest = Annotated[str, typer.Option(help="Per tensor: crc32, sha256 or none.", rich_help_panel=OUTPUT)]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Go on although a source holds NaN or Inf.", rich_help_panel=OUTPUT)
]
PushTo = Annotated[
    str | None, typer.Option(help="ORG/NAME: upload the finished folder, private.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=TALK)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.", rich_help_panel=TALK)
]


InputIds = Annotated[str | None, typer.Option(help="Token ids: .npy, .safetensors or .json.", rich_help_panel=PROBE)]
Text = Annotated[str | None, typer.Option(help="Text file, cut by the tokenizer in the folder.", rich_help_panel=PROBE)]
Device = Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=PROBE)]
CALIBRATION = "Calibration"
CalTokens = Annotated[int, typer.Option(help="Calibration tokens.", rich_help_panel=CALIBRATION)]
CalIds = Annotated[
    str | None, typer.Option("--input-ids", help="Token ids: .npy, .safetensors or .json.", rich_help_panel=CALIBRATION)
]
CalText = Annotated[
    str | None, typer.Option("--text", help="Text file, cut by the teacher's tokenizer.", rich_help_panel=CALIBRATION)
]
Chunk = Annotated[
    int, typer.Option(help="Tokens per sequence: no decay can see beyond it.", rich_help_panel=CALIBRATION)
]
RandomTokens = Annotated[
    bool, typer.Option("--random-tokens", help="Fit to random tokens (much worse).", rich_help_panel=CALIBRATION)
]
RefitOutput = Annotated[
    str, typer.Option(help="Fit the output matrix too: auto, never or always.", rich_help_panel=CALIBRATION)
]
RefineSteps = Annotated[
    int, typer.Option(help="Local refinement after the closed form; 0 for none.", rich_help_panel=CALIBRATION)
]
TokenSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of random tokens.", rich_help_panel=CALIBRATION)]
FoldRope = Annotated[
    bool, typer.Option("--fold-rope", help="Fit GQA layers to losing RoPE (changes them).", rich_help_panel=CALIBRATION)
]
CalPlot = Annotated[
    str | None,
    typer.Option(
        "--plot", help="Draw errors and decays by layer: NAME.png, .svg or .pdf.", rich_help_panel=CALIBRATION
    ),
]
CalDevice = Annotated[str, typer.Option("--device", help="cpu or cuda.", rich_help_panel=CALIBRATION)]
PadFfn = Annotated[
    int | None, typer.Option(help="256 or 512: widen MLPs with zeros to a multiple.", rich_help_panel=OUTPUT)
]
