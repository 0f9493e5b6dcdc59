"""x"""
from pennyweight.records import *
def judge(text,task):
    a=text.split("####")[-1].strip().split("\n")[0] if "####" in text else None
    return Verdict(a==task.answer,a)
def judge_sample(s): return judge(s.response,s.task) if s.task else None
VERIFIERS={"exact":judge}
