"""One run in several goes, by one process or many, on one machine or many: a folder holds what is done.

folder.py       the folder: what run it belongs to, and a file for each shard that is done
fingerprint.py  what must be the same for two runs to give the same numbers
share.py        who runs which shard

No process speaks to another. Whoever has the lock of a shard runs it; a lock goes when its process does.
"""

from lazarus.shards.fingerprint import fingerprint
from lazarus.shards.folder import FEWEST_SHARDS, WorkFolder
from lazarus.shards.share import Shard, run_shards, states

__all__ = ["FEWEST_SHARDS", "Shard", "WorkFolder", "fingerprint", "run_shards", "states"]
