"""Wrong options of `generate`: what a user writes, and the words that the one line must have."""

Row = tuple[tuple[str, ...], tuple[str, ...]]
"""Arguments of the command, and words of the line."""

LONG = "x" * 5000
BIG = "9" * 23
HUGE = "9" * 400


def with_model(*args: str) -> tuple[str, ...]:
    return ("generate", "-p", "w1", "-m", "{good}", *args)


def option(option: str, value: str, *words: str) -> Row:
    """A wrong value of an option of `generate`: the line names the option."""
    return ("generate", "-p", "w1", option, value), (option, *words)


def model(name: str, *words: str) -> Row:
    return ("generate", "-p", "w1", "-m", f"{{{name}}}"), words


SIZES: list[Row] = [
    option("--device-memory", "24 gigs", "'24 gigs'", "24GiB"),
    option("--device-memory", "24", "did you mean '24GiB'?"),
    option("--device-memory", "1.5", "did you mean '1.5GiB'?"),
    option("--device-memory", "", "''", "24GiB"),
    option("--device-memory", "0", "positive"),
    option("--device-memory", "-1GiB", "'-1GiB'"),
    option("--device-memory", "1e9", "'1e9'"),
    option("--device-memory", "inf", "'inf'"),
    option("--device-memory", HUGE, "more than 1024 PiB"),
    option("--device-memory", "24GiB,", "''", "24GiB"),
    option("--device-memory", "24GiB,lots", "'lots'"),
    option("--host-memory", "lots", "'lots'"),
    option("--host-memory", "8.5", "'8.5GiB'"),
    option("--host-memory", f"{BIG}TiB", "more than 1024 PiB"),
]
COUNTS: list[Row] = [
    option("--chunk-tokens", "0", "positive", "'0'"),
    option("--chunk-tokens", "-5", "'-5'"),
    option("--chunk-tokens", "1.5", "'1.5'"),
    option("--chunk-tokens", "all", "'all'"),
    option("--chunk-tokens", "4k5", "'4k5'"),
    option("--chunk-tokens", "", "''"),
    option("--chunk-tokens", "999999999999", "more than 68,719,476,736"),
    option("--chunk-tokens", HUGE, "more than 68,719,476,736"),
    option("--tile-heads", "0", "'0'", "'all' or 'auto'"),
    option("--tile-heads", "2.5", "'2.5'"),
    option("--tile-heads", "999999999999", "more than"),
    option("--tile-tokens", "0", "'0'"),
    option("--tile-tokens", "many", "'many'"),
    option("--tile-tokens", "999999999999", "more than"),
    option("--resident-tokens", "-1", "from 0 on", "'-1'"),
    option("--resident-tokens", "999999999999", "more than"),
    option("--sink-tokens", "-1", "'-1'"),
    option("--sink-tokens", "999999999999", "more than"),
    option("--recent-tokens", "0", "'0'"),
]
SHARES: list[Row] = [
    option("--host-attention", "2", "from 0 to 1"),
    option("--host-attention", "half", "'half'", "'off' or 'auto'"),
    option("--host-attention", "nan", "'nan'"),
    option("--host-attention", "-0.1", "'-0.1'"),
    option("--sparsity", "2", "from 0 to 1"),
    option("--sparsity", "auto", "'auto'"),
    option("--sparsity", "", "''"),
    option("--head-pattern", "", "''", "'random'"),
    option("--fuse", "on", "'auto' or 'off'"),
    option("--device", "tpu", "'tpu'", "cuda"),
    option("--device", "cuda:1", "'cuda:1'"),
]
NUMBERS: list[Row] = [
    option("--gpus", "0", "'0'", "at least 1"),
    option("--gpus", "two", "'two'"),
    option("--threads", "0", "'0'", "at least 1"),
    option("--threads", "-1", "'-1'"),
    option("--threads", "1.5", "'1.5'", "whole number"),
    option("--threads", "100000", "at most", "for each core"),
    option("--threads", HUGE, "at most"),
    option("--seed", "x", "'x'", "whole number"),
    option("--seed", "1.5", "'1.5'", "whole number"),
    option("--seed", "", "''", "whole number"),
    option("--seed", BIG, BIG, "2**64 - 1"),
    option("--seed", "-9223372036854775809", "-2**63"),
    option("--dtype", "float64", "'float64'", "'bfloat16'"),
    option("--kv-cache", "int4", "'int4'", "dense, packed"),
    option("--dtype", "", "''", "'bfloat16'"),
    option("--max-new-tokens", "0", "at least 1"),
    option("--max-new-tokens", "4K", "'4K'", "whole number"),
    option("--max-new-tokens", BIG, "at most 2,147,483,647"),
    option("--temperature", "0", "above 0", "--no-do-sample"),
    option("--temperature", "-1", "above 0"),
    option("--temperature", "hot", "'hot'", "number"),
    option("--temperature", "inf", "finite"),
    option("--temperature", "1e400", "finite"),
    option("--top-k", "-1", "at least 0"),
    option("--top-k", "some", "'some'", "whole number"),
    option("--top-k", BIG, "at most"),
    option("--top-p", "1.5", "at most 1"),
    option("--top-p", "nan", "finite"),
    option("--min-p", "2", "from 0 to 1"),
    option("--repetition-penalty", "0", "above 0"),
    option("--repetition-penalty", "inf", "finite"),
    option("--no-repeat-ngram-size", "-1", "at least 0"),
    option("--no-repeat-ngram-size", BIG, "at most"),
    option("--num-beams", "0", "at least 1"),
    option("--num-beams", BIG, "at most"),
    option("--length-penalty", "1", "--num-beams"),
    option("--prompt-lookup", "0", "at least 1"),
    option("--prompt-lookup", BIG, "at most"),
    option("--draft", "0", "from 1 to 31"),
    option("--draft", BIG, "from 1 to 31"),
    option("--draft", "many", "'off' or 'auto'"),
]
DISK_FOLDERS = [
    ("", "must be a folder"),
    ("/nowhere/at/all", "is not there"),
    ("/dev/null", "is a file"),
    ("a\0b", "names no folder"),
]
"""What `--disk-cache` cannot be, and what is said of it."""

TOGETHER: list[Row] = [
    (("generate", "-p", "w1", "-p", "w2"), ("--prompt/-p", "2 times")),
    (("generate", "-p", "w1", "--seed", "1", "--seed", "1"), ("--seed", "2 times")),
    (
        ("generate", "-p", "w1", "--do-sample", "--no-do-sample"),
        ("--do-sample and --no-do-sample",),
    ),
    (("generate", "-f", "-", "-f", "-"), ("--prompt-file -", "stdin")),
    (("generate", "-p", "w1", "--no-do-sample", "--temperature", "0.5"), ("--temperature",)),
    (
        ("generate", "-p", "w1", "--prompt-lookup", "3", "--num-beams", "2"),
        ("--prompt-lookup", "--num-beams"),
    ),
    (
        ("generate", "-p", "w1", "--prompt-lookup", "3", "--prompt-lookup-num-tokens", "3"),
        ("one option",),
    ),
    (
        ("generate", "-p", "w1", "--num-beams", "2", "--length-penalty", "nan"),
        ("--length-penalty", "finite"),
    ),
    (
        ("generate", "-p", "w1", "--draft", "auto", "--draft-tokens", "0"),
        ("--draft auto", "--draft-tokens 0", "leave one of them out"),
    ),
    (
        ("generate", "-p", "w1", "--draft", "off", "--assistant", "x"),
        ("--draft off", "--assistant"),
    ),
    (("generate", "-p", "w1", "--draft", "off", "--prompt-lookup", "3"), ("--prompt-lookup",)),
    (("generate", "-p", "w1", "--draft", "off", "--draft-tokens", "9"), ("--draft-tokens",)),
    (
        ("generate", "-p", "w1", "--prompt-lookup", "3", "--draft-tokens", "9"),
        ("--draft-tokens 9", "--prompt-lookup drafts", "leave one of them out"),
    ),
    (("generate", "-p", "w1", "--assistant", "x", "--draft-tokens", "auto"), ("--draft-tokens",)),
    (
        ("generate", "-p", "w1", "--assistant", "x", "--prompt-lookup", "3"),
        ("--assistant and --prompt-lookup both draft",),
    ),
    *(
        ((*verb, "--disk-cache", folder), ("--disk-cache", words))
        for verb in (("generate", "-p", "w1"), ("chat",), ("serve",))
        for folder, words in DISK_FOLDERS
    ),
    (("generate", "-p", "w1", "--no-such-option"), ("--no-such-option",)),
    (("generate", "-p", "w1", "--dtype"), ("--dtype", "requires an argument")),
    (("generate", "w1"), ("unexpected", "w1")),
    (("nope",), ("'nope'",)),
    (("--nope",), ("--nope",)),
]

BEFORE_THE_MODEL: list[Row] = [*SIZES, *COUNTS, *SHARES, *NUMBERS, *TOGETHER]
"""What is told before anything is loaded."""
