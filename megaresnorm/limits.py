"""Upper bounds of the counts of recipes and commands.

They are far above anything that has been trained, and small enough that nothing that is listed, summed or multiplied
before a tensor is made takes minutes, gigabytes, or more than 64 bits.
"""

MAX_BLOCKS = 10_000  # names, costs and settings of every block are listed
MAX_CHUNKS = 1_000  # parts of the rows, each with a message of its own
MAX_HISTORY = 10_000  # steps, of which every linear layer keeps two numbers each
MAX_WIDTH = 1 << 22  # columns; the product of two of these and a vocabulary is still a size that torch can take
MAX_VOCAB = 1 << 24  # rows of the embedding; a count of each token is in memory where token shares are asked for
MAX_SEQ_LEN = 1 << 27  # tokens
MAX_STEPS = 10**10  # steps times samples is below 2^63
MAX_BATCH = 10**8  # samples of one step
MAX_SOURCES = 1_000  # data sets of a blend, each of which is opened
MAX_RANKS = 1 << 20  # processes: ten times the largest cluster; more is a mistake that would be waited for
MAX_SECONDS = 7 * 24 * 3600  # that ranks wait for each other: more is a rank that nobody would miss
MAX_BUCKET = 1 << 31  # elements that DeepSpeed sends at a time, for which it allocates FP32 at once
MAX_ELEMENTS = 1 << 62  # of weights, where it only compares
MAX_TOKENS = 10**6  # tokens of one generated text, which is kept as a whole
# Settings are used in FP32: a smaller positive number is 0 there, or loses digits and is 0 on hardware that flushes
# it; a larger one is infinite.
FP32_TINY = 1.1754943508222875e-38
FP32_MAX = 3.4028234663852886e38
LARGEST_POWER = 126  # of two, whose reciprocal FP32 holds as a normal number, too
MAX_SHOWN = 60  # characters of a name, value or argument that an error shows
MAX_PROFILED = 1_000  # steps of a profile
