"""x"""
from pennyweight.data.tasks import problems
def read(s): raise NotImplementedError
def read_tasks(source):
    return [p for i,t in enumerate(source.tasks) for p in problems(t.name,t.size,source.seed*1000+i,t.config)]
