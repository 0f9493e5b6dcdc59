"""x"""
from pennyweight.records import *
def problems(name,size,seed,config):
    import reasoning_gym as rg
    out={}
    for e in rg.create_dataset(name,size=size,seed=seed,**config):
        ex=e['metadata']['expression'].split(); acc=int(ex[0]); lines=[]
        for op,b in zip(ex[1::2],ex[2::2]):
            n=acc+int(b) if op=='+' else acc-int(b); lines.append(f"{acc} {op} {b} = {n}"); acc=n
        t="\n".join(lines+[f"#### {e['answer']}"])
        s=Sample((Message("user",e['question']),),t,"reasoning-gym/"+name,"Apache-2.0",task=Task(name,"exact",e['answer'],canonical_json(e)))
        out.setdefault(s.prompt_hash,s)
    return list(out.values())
