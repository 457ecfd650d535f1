"""Counts samples and tokens of the example data with the Python package tokenizers, for tasks.rs."""
import json, pathlib
from tokenizers import Tokenizer
root = str(pathlib.Path(__file__).resolve().parents[4]) + "/examples/"
t=Tokenizer.from_file(root+'tiny-llama-14m/tokenizer.json')
def ids(s): return t.encode(s,add_special_tokens=False).ids
M=256
for f in ['chat.test','chat.train','define.test','define.train','sentiment.test','sentiment.train','shakespeare.eval','shakespeare.train']:
    recs=[json.loads(l) for l in open(root+'tasks/'+f+'.jsonl')]
    samples=tokens=trained=0; merged=0; trunc=0
    for r in recs:
        if 'text' in r:
            n=len(ids(r['text']))+1
            while n:
                k=min(n,M)
                if n-k==1: k-=1
                samples+=1; tokens+=k; trained+=k-1; n-=k
        elif 'prompt' in r:
            p=ids(r['prompt']); a=ids(r['prompt']+r['completion'])
            if a[:len(p)]!=p: merged+=1
            samples+=1; tokens+=len(a)+1; trained+=len(a)+1-len(p)
            if len(a)+1>M: trunc+=1
        else:
            s=''; tr=0
            n=0
            for m in r['messages']:
                x=f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
                s+=x
                if m['role']=='assistant': tr+=len(ids(x))-len(ids("<|im_start|>assistant\n"))-1
            samples+=1; tokens+=len(ids(s)); trained+=tr
            if len(ids(s))>M: trunc+=1
    form='text' if 'text' in recs[0] else 'prompt-completion' if 'prompt' in recs[0] else 'messages'
    print(f'    Task {{ file: "{f}.jsonl", form: "{form}", records: {len(recs)}, samples: {samples}, tokens: {tokens}, trained_tokens: {trained} }},', 'merged',merged,'trunc',trunc)
