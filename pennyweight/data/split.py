"""x"""
from dataclasses import dataclass
@dataclass(frozen=True)
class Split:
    train: list
    evaluation: list
    duplicates: int
    overlap: dict
def is_held_out(h, f): return int(h[:15],16)/16**15 < f
def split(samples, f, limit):
    seen={}
    for s in samples: seen.setdefault(s.id,s)
    u=list(seen.values())
    ev=sorted([s for s in u if is_held_out(s.prompt_hash,f)],key=lambda s:s.prompt_hash)[:limit]
    tr=[s for s in u if not is_held_out(s.prompt_hash,f)]
    return Split(tr,ev,len(samples)-len(u),{"normalised":0,"ngram":0,"eval":len(ev),"examples":[]})
