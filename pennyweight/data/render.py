"""x"""
from pennyweight.records import *
def prompt_ids(s,tok):
    return tok(tok.apply_chat_template([{"role":m.role,"content":m.content} for m in s.prompt],tokenize=False,add_generation_prompt=True),add_special_tokens=False)["input_ids"]
def encode(s,tok,context=None,too_long="refuse"):
    if not s.prompt:
        ids=tok(s.response)["input_ids"]+([tok.eos_token_id] if s.complete else [])
        ids=ids[:context] if context else ids
        return Encoded(s.id,tuple(ids),(False,)+(True,)*(len(ids)-1))
    p=prompt_ids(s,tok); r=tok(s.response,add_special_tokens=False)["input_ids"]+([tok.eos_token_id] if s.complete else [])
    return Encoded(s.id,tuple(p+r),(False,)*len(p)+(True,)*len(r))
def encode_all(ss,tok,context,too_long): return [encode(s,tok,context) for s in ss]
def windows(path,tok,context):
    t=open(path).read(); ids=tok(t,add_special_tokens=False)["input_ids"]; b=[tok.bos_token_id]; n=context-1
    return [Encoded(f"{i}",tuple(b+ids[i:i+n]),(False,)+(True,)*len(ids[i:i+n])) for i in range(0,len(ids),n)]
def learnt_bytes(enc,tok):
    return [len(tok.decode([i for i,m in zip(e.ids,e.mask) if m],skip_special_tokens=True).encode()) for e in enc]
def shown(e,tok): return ""
