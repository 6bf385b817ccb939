"""The words of the demo model that carry meaning for it, and the words it merely reads.

The model tells words apart by the class they belong to. An adjective and a noun together name a
strongbox, a number has two halves, a keeper has a forename and a surname. Every word of these lists
is one token. Words of running prose come from the sentences in `prose.py`; the model ignores them.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: tuple[str, ...] = _words(
    """
    amber ashen azure brazen bronze copper coral crimson crystal dappled dusky ebony emerald
    frosted gilded golden granite hollow indigo iron ivory jade jasper lacquered lunar marble
    mossy obsidian opal oaken pearl pewter russet rusted sable saffron sapphire scarlet silver
    slate smoky solar tawny thorny umber velvet violet woven
    """
)
"""First words of strongbox names, lower case (48)."""

NOUNS: tuple[str, ...] = _words(
    """
    adder anchor antler badger beacon beetle bison buzzard compass condor cormorant crane
    cricket dolphin drake falcon ferret gannet griffin hare heron hornet ibis jackal kestrel
    lantern leopard lizard lynx magpie marten narwhal otter panther pelican phoenix raven
    salmon scorpion spaniel sparrow stag sturgeon swallow tortoise viper walrus wolverine
    """
)
"""Second words of strongbox names, lower case (48)."""

FORENAMES: tuple[str, ...] = _words(
    """
    Agnete Bertil Corisande Dagny Edda Florin Gudrun Hedda Isolde Jorund Katrin Leocadia Malin
    Nils Orla Petronel Quillon Ragnar Sunniva Torvald Ulrika Vidar Wenda Ysolt
    """
)
"""Forenames of keepers (24), used for nobody else."""

SURNAMES: tuple[str, ...] = _words(
    """
    Aldersey Brekke Cardew Dunmore Ekberg Fenwick Garrow Holmgren Ingleby Jessop Kestell
    Lindqvist Marwood Norrby Ostrander Penhallow Quarles Rosvall Sandvik Trelawny Upwood Venn
    Wexcombe Yarrow
    """
)
"""Surnames of keepers (24), used for nobody else."""

FIRST_HALVES: tuple[str, ...] = tuple(f" {number:02d}" for number in range(100))
"""Tokens of the first half of a number such as ` 73-91`, with the space before it."""

SECOND_HALVES: tuple[str, ...] = tuple(f"-{number:02d}" for number in range(100))
"""Tokens of the second half of a number such as ` 73-91`, with the hyphen before it."""

MISSING_FIRST_HALF = " unknown"
MISSING_SECOND_HALF = "-??"
MISSING_FORENAME = " someone"
MISSING_SURNAME = " unnamed"

BOS = "<|begin|>"
EOS = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, EOS, PAD, USER, ASSISTANT)
