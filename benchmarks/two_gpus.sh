#!/usr/bin/env bash
# Serving and quantizing on two GPUs of one host, without a network there; at most 490 s.
#
#     bash benchmarks/two_gpus.sh PARTS OUT      in the root of the repository
#
# PARTS: what `benchmarks/vllm_parts.py --wheels` wrote. OUT: a folder for logs, serving.jsonl and large.jsonl, which come
# as soon as each is measured. A model of Llama-3-8B's shape is served on both GPUs (`serving.py --tensor-parallel 2`: four
# engines start at once and are measured in turns); beside that, the weights of Llama-3-70B's shape are written and
# quantized from files, then served (`llama_70b.py`). Needs mxcompile installed for `python`, 32 cores, 200 GB of memory.
# Measured: 70B quantized after 135 s, 8B measured after 250, 70B measured after 350, gptq of its first layer after 470.
PARTS=$1 R=$2
set -u
LIMIT=${LIMIT:-480}
SITE=${SITE:-$R/site}
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=8
# its folders appear whole (mv): processes that start before do not see them, and need nothing of them
export PYTHONPATH=$SITE/vllm-site:$SITE/wheels-site${PYTHONPATH:+:$PYTHONPATH}
say() { echo "[$SECONDS s] $*"; }
left() { echo $((LIMIT - SECONDS)); }
RAM=/dev/shm
mount -o remount,size=235G /dev/shm || { RAM=/mnt/ram; mkdir -p $RAM; mount -t tmpfs -o size=235G tmpfs $RAM; }
W=${W:-$RAM/w}
mkdir -p $W $SITE $R
R=$(cd $R && pwd)
say "cores $(nproc --all), $(grep MemTotal /proc/meminfo), $(df -h $RAM | tail -1)"
{ nvidia-smi topo -m; nvidia-smi --query-gpu=name,memory.used,memory.total --format=csv; } > $R/machine.txt 2>&1

# 1. weights of the 70B shape and their quantization; needs vLLM only for its engine of one layer
setsid timeout -k 5 300 python benchmarks/llama_70b.py --work $W/70b --parts files --workers ${WORKERS:-16} --limit 150 \
    --out $R/large.jsonl ${SMALL70:-} > $R/70b-files.txt 2>&1 &
FILES=$!

# 2. stop that process while memory is short (a virtual machine's may grow as it is used), and while 8B engines are measured
cat > $W/watch.py <<'PY'
import os, signal, sys, time
group, log, done = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stopped, since, began, said = False, 0.0, time.time(), 0.0
def memory():
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    return [int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable", "Shmem")]
def measuring():
    return os.path.exists(log) and "engines are ready" in open(log, errors="replace").read() and not os.path.exists(done)
while True:
    total, free, shm = memory()
    short = total < 240 and (free < 4 if not stopped else free < 10 and time.time() - since < 3)
    wanted = short or measuring()
    try:
        if wanted != stopped:
            os.killpg(group, signal.SIGSTOP if wanted else signal.SIGCONT)
            print(f"{time.time() - began:.1f} s: {'stopped' if wanted else 'goes on'}, short {short}, GiB {total:.0f} {free:.0f}", flush=True)
            stopped, since = wanted, time.time()
        else:
            os.killpg(group, 0)
    except ProcessLookupError:
        group = group if time.time() - began < 2 else -1
        if group < 0:
            group, stopped = os.getpgid(0), False
            break
    if time.time() - said > 5:
        said = time.time()
        print(f"{said - began:.0f} s: GiB in all {total:.0f}, free {free:.0f}, shm {shm:.0f}; load {os.getloadavg()[0]:.0f}", flush=True)
    time.sleep(0.1)
while True:
    total, free, shm = memory()
    print(f"{time.time() - began:.0f} s: GiB in all {total:.0f}, free {free:.0f}, shm {shm:.0f}; load {os.getloadavg()[0]:.0f}", flush=True)
    time.sleep(5)
PY
python $W/watch.py $FILES $R/serving.txt $W/8b-done > $R/watch.txt 2>&1 &
WATCH=$!

# 3. the 8B shape on two GPUs: engines start about 50 s from now
mkdir -p $W/8b
timeout -k 5 ${T8:-300} python benchmarks/serving.py --tensor-parallel 2 --together --compare --batches ${BATCHES:-1,8,32,64} \
    --rounds 6 --seconds ${T8:-300} --limit ${LIMIT8:-170} --folder $W/8b --out $R/serving.jsonl ${SMALL8:-} > $R/serving.txt 2>&1 &
SERVING=$!

# 4. vLLM, unpacked beside that
if [ ! -d $SITE/vllm-site ]; then
    mkdir $SITE/v && for part in kernels attention python; do tar -xJf $PARTS/$part.tar.xz -C $SITE/v & P="${P:-} $!"; done
    timeout 60 python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $SITE/w $PARTS/wheels/*.whl 2>&1 | tail -5
    mv $SITE/w $SITE/wheels-site
    wait $P
    mv $SITE/v $SITE/vllm-site
    say "vLLM is unpacked: $(ls $SITE/vllm-site | tr '\n' ' ')"
fi
if ! python -c "import sys; from importlib.metadata import entry_points as e; sys.exit(not [p for p in e(group='vllm.general_plugins') if p.name == 'mxcompile'])"; then
    say "mxcompile's entry point is not installed: written"
    D=$SITE/wheels-site/mxcompile_entry-0.dist-info; mkdir -p $D
    printf 'Metadata-Version: 2.1\nName: mxcompile-entry\nVersion: 0\n' > $D/METADATA
    printf '[vllm.general_plugins]\nmxcompile = mxcompile.serving:register\n' > $D/entry_points.txt
fi
# memory of one GPU read by the other in another process: what vLLM's own all-reduce does; without it NCCL's is taken
cat > $W/probe.py <<'PY'
import torch, torch.multiprocessing as mp
def reads(queue, answers):
    other = queue.get()
    torch.cuda.set_device(1)
    answers.put(float((other.to("cuda:1") + 1).sum()))
    del other
if __name__ == "__main__":
    assert torch.cuda.can_device_access_peer(0, 1) and torch.cuda.can_device_access_peer(1, 0), "no access to the other GPU"
    mp.set_start_method("spawn")
    queue, answers = mp.Queue(), mp.Queue()
    process = mp.Process(target=reads, args=(queue, answers)); process.start()
    values = torch.full((1 << 20,), 2.0, device="cuda:0")
    queue.put(values)
    total = answers.get(timeout=20)
    process.join(5)
    assert total == 3.0 * (1 << 20), total
    print("GPU 1 reads GPU 0's memory in another process")
PY
if [ -z "${SKIP_PROBE:-}" ] && ! PYTHONPATH= timeout -k 2 25 python $W/probe.py > $R/probe.txt 2>&1; then
    sed -i 's/^    custom_ar = True/    custom_ar = False/' $SITE/vllm-site/vllm/distributed/device_communicators/custom_all_reduce.py
    say "vLLM's own all-reduce is switched off: $(tail -1 $R/probe.txt)"
fi
cat $R/probe.txt
say "compiling Python"; python -m compileall -q -j 8 $SITE/vllm-site/vllm $SITE/wheels-site > /dev/null 2>&1
python -c "import vllm._C_stable_libtorch, vllm; print(vllm.__version__, vllm.__file__)"
say "vLLM imports"

wait $SERVING; say "8B: status $?"
touch $W/8b-done
kill -9 -- -$SERVING 2>/dev/null  # what is left of its engines
grep -v '"variant"' $R/serving.txt | tail -60
cut -c1-600 $R/serving.jsonl
tail -3 $R/watch.txt
wait $FILES; say "70B files: status $?"
tail -25 $R/70b-files.txt | cut -c1-600
rm -rf $W/8b

# 5. the 70B shape on two GPUs
setsid timeout -k 5 $(left) python benchmarks/llama_70b.py --work $W/70b --parts engines --limit ${LIMIT70:-150} \
    --out $R/large.jsonl ${SMALL70:-} > $R/70b-engines.txt 2>&1 &
ENGINES=$!
wait $ENGINES; say "70B engines: status $?"
tail -40 $R/70b-engines.txt | cut -c1-800
kill $WATCH
for group in $FILES $ENGINES; do kill -9 -- -$group 2>/dev/null; done
tail -5 $R/watch.txt
for file in $R/*.txt; do tail -c 150000 $file > $file.cut && mv $file.cut $file; done
rm -rf $W
say "end"
