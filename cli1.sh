. /tmp/w/adv/env.sh
R="$PY -m realm_jax"
W=/tmp/w/adv/c1; chmod -R u+w $W 2>/dev/null; rm -rf $W; mkdir $W; 
$PY - <<'P'
from pathlib import Path; from hf_folders import golden; from tiny import write_model
W=Path("/tmp/w/adv/c1"); golden("qwen2",W); golden("llama",W); write_model(W/"m.gguf",width=256,ffn=512)
P
cd $W; ls -la qwen2
t(){ echo "--- $*"; timeout 100 "$@" 2>&1 | tail -4 | cut -c1-400; echo "rc ${PIPESTATUS[0]}"; }
t $R convert hf qwen2 .
t $R convert hf qwen2 /
t $R convert hf qwen2 ..
t $R convert hf qwen2 qwen2
t $R convert hf qwen2 nodir/x.gguf
t $R convert hf qwen2 qwen2/config.json; head -c 20 qwen2/config.json; echo
rm -rf qwen2; $PY -c "
from pathlib import Path; from hf_folders import golden; golden('qwen2',Path('/tmp/w/adv/c1'))"
t $R convert hf m.gguf o.gguf
t $R convert hf nothing o.gguf
t $R convert hf . o.gguf
t $R convert hf Qwen/Qwen2.5-0.5B o.gguf
t $R convert hf qwen2 o.gguf --type Q8_0
t $R convert hf qwen2 o.gguf --type q9
t $R convert hf qwen2 ""
t $R convert hf qwen2 $(printf 'x%.0s' {1..250}).gguf
t $R quantize m.gguf . Q8_0
t $R quantize m.gguf / Q8_0
t $R quantize m.gguf "" Q8_0
t $R quantize m.gguf m.gguf Q8_0
t $R quantize m.gguf qwen2 Q8_0
t $R quantize - o.gguf Q8_0
t $R quantize m.gguf - Q8_0
t $R quantize m.gguf o.gguf Q9
t $R quantize m.gguf q8.gguf q8_0
t $R quantize q8.gguf q4.gguf Q4_0
t $R quantize q8.gguf q4.gguf Q8_0
t $R quantize nothing.gguf q4.gguf Q8_0
t $R quantize qwen2 q4.gguf Q8_0
t $R quantize m.gguf q4.gguf Q8_0 --imatrix nothing
t $R quantize m.gguf q4.gguf Q8_0 --imatrix .
t $R quantize m.gguf q4.gguf Q8_0 --imatrix m.gguf
t $R quantize m.gguf q4.gguf Q8_0 --imatrix qwen2/config.json
t $R quantize m.gguf q4.gguf Q8_0 --output-tensor-type Q9
t $R quantize m.gguf q4.gguf Q8_0 --output-tensor-type IQ2_XXS
mkdir ro; chmod 555 ro
t $R quantize m.gguf ro/x.gguf Q8_0
t $R convert orbax m.gguf ro/x
t $R convert orbax m.gguf ck
t $R convert orbax m.gguf ck
t $R convert orbax m.gguf .
t $R convert orbax m.gguf ""
t $R convert orbax ck ck2
t $R convert orbax qwen2 ck3
t $R convert orbax m.gguf m.gguf
t $R quantize ck ck Q8_0
t $R quantize ck ck/index.json Q8_0; head -c 10 ck/index.json; echo
t $R quantize ck ckq.gguf Q8_0
t $R inspect ck
t $R generate hello -m ck -n 4 -c 64
(cd ck2; t $R generate hello -m . -n 4 -c 64; chmod 000 header.gguf;  t $R generate hello -m . -n 4 -c 64)
ls
