import torch, json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, AutoModelForImageClassification
cfg=ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8,16], depths=[1,1], layer_type="basic", num_labels=10)
torch.manual_seed(0)
m=AutoModelForImageClassification.from_config(cfg).eval()
f=Path("ctf"); shutil.rmtree(f,ignore_errors=True); m.save_pretrained(f)
t=load_file(f/"model.safetensors"); out={}; ref=dict(t)
for n,w in t.items():
    if w.ndim>=2:
        s=w.flatten(1).abs().amax(1)/127
        sh=[-1]+[1]*(w.ndim-1)
        q=(w/s.view(sh)).round().clamp(-127,127).to(torch.int8)
        out[n]=q; out[n+"_scale"]=s.view(sh).contiguous(); ref[n]=q.float()*s.view(sh)
    else: out[n]=w
save_file(out,f/"model.safetensors",metadata={"format":"pt"})
c=json.load(open(f/"config.json"))
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.config import CompressionFormat
sch=QuantizationScheme(targets=["Linear"],weights=QuantizationArgs(num_bits=8,type="int",symmetric=True,strategy="channel"),format="naive-quantized")
c["quantization_config"]=QuantizationConfig(config_groups={"group_0":sch},ignore=[],quantization_status="compressed",format="naive-quantized").to_dict()
c["quantization_config"]["dequantize"]=True
json.dump(c,open(f/"config.json","w"),default=str)
r=AutoModelForImageClassification.from_pretrained(f).eval()
m.load_state_dict(ref)
x=torch.randn(4,1,8,8)
print((r(x).logits-m(x).logits).abs().max(), {n:p.dtype for n,p in list(r.named_parameters())[:3]})
