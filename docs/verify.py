#!/usr/bin/env python3
"""Proves a Token Broker audit log, independently of the broker. Python 3.8 and openssl, nothing else.

    python3 verify.py [--keys audit-keys.pem] [--heads audit-heads.jsonl] FILE...

FILE is what `audit export` or `audit tail --json` wrote, or a segment of a journal; see audit-format.md.
"""
import argparse, datetime, hashlib, json, re, subprocess, sys, tempfile

def net(value):
    if value is None: return b"-"
    data = value if isinstance(value, bytes) else str(value).encode()
    return b"%d:%s," % (len(data), data)

def micros(at):
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    return (datetime.datetime.fromisoformat(at.replace("Z", "+00:00")) - epoch) // datetime.timedelta(microseconds=1)

def record_hash(e):
    pairs = sorted((k.encode(), v.encode()) for k, v in e.get("detail", {}).items())
    values = [e["instance"], e["chain"], e["seq"], micros(e["at"]), e["event"]]
    values += [e.get(k) for k in ("caller", "caller_kind", "peer", "account")] + [e["outcome"]]
    values += [e.get(k) for k in ("reason", "generation", "token_fingerprint", "trace_id", "latency_us")]
    canonical = b"".join(map(net, values + [e["count"], b"".join(net(k) + net(v) for k, v in pairs)]))
    return hashlib.sha256(b"token-broker audit event v1\n" + bytes.fromhex(e["prev_hash"]) + canonical).hexdigest()

def genuine(keys, kind, values, statement):
    if not keys: return True
    with tempfile.NamedTemporaryFile() as key, tempfile.NamedTemporaryFile() as message, tempfile.NamedTemporaryFile() as signature:
        for file, data in ((key, keys.get(statement["key_id"], "").encode()), (signature, bytes.fromhex(statement["signature"])),
                           (message, b"token-broker audit %s v1\n" % kind + b"".join(map(net, values)))):
            file.write(data); file.flush()
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key.name, "-rawin", "-in", message.name, "-sigfile", signature.name]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--keys"); arguments.add_argument("--heads"); arguments.add_argument("files", nargs="+")
given = arguments.parse_args()
keys = dict(re.findall(r"# (\w+)\n(-----BEGIN[^#]*)", open(given.keys).read())) if given.keys else {}
chains, cuts, heads, records, faults = {}, {}, [], {}, []

def read(line):
    it = json.loads(line)
    if "event" in it:
        if record_hash(it) != it["hash"]: faults.append((it["chain"], it["seq"], "was altered"))
        records.setdefault(it["chain"], {})[it["seq"]] = (it["prev_hash"], it["hash"])
    elif "chain" in it and isinstance(it["chain"], dict):
        chains[it["chain"]["chain"]] = it["chain"]
    elif "cut" in it:
        c = it["cut"]
        values = [c["chain"], c["first_seq"], bytes.fromhex(c["prev_hash"]), c["last_seq"], bytes.fromhex(c["hash"]), micros(c["at"])]
        if genuine(keys, b"cut", values, c): cuts.setdefault(c["chain"], {})[c["first_seq"]] = c
        else: faults.append((c["chain"], c["first_seq"], "was cut by nobody"))
    elif "head" in it or "signature" in it:
        heads.append(it.get("head", it))

for file in given.files + ([given.heads] if given.heads else []):
    for line in open(file, encoding="utf-8", newline="\n"): read(line)
for chain in sorted(set(records) | set(cuts) | set(chains)):
    here, gone = records.get(chain, {}), cuts.get(chain, {})
    root = chains[chain]["linked_hash"] if chain in chains else None
    seq, head = (0, root) if root else (min([*here, *gone], default=1) - 1, None)
    last = max([*here, *(c["last_seq"] for c in gone.values()), chains.get(chain, {}).get("last_seq") or 0])
    ends = {seq: head}
    while seq < last:
        cut = gone.get(seq + 1)
        step = here.get(seq + 1) or (cut and (cut["prev_hash"], cut["hash"]))
        if not step: faults.append((chain, seq + 1, "is missing")); head = None; seq += 1; continue
        if head not in (None, step[0]): faults.append((chain, seq, "is not what its successor was written after"))
        seq, head = (seq + 1 if seq + 1 in here else cut["last_seq"]), step[1]
        ends[seq] = head
    for h in (h for h in heads if h["chain"] == chain):
        if not genuine(keys, b"head", [chain, h["seq"], bytes.fromhex(h["hash"]), micros(h["at"])], h): faults.append((chain, h["seq"], "has a forged head"))
        elif h["seq"] > seq: faults.append((chain, seq + 1, "is missing: a head of %d was signed" % h["seq"]))
        elif ends.get(h["seq"], h["hash"]) != h["hash"]: faults.append((chain, h["seq"], "is not the one whose head was signed"))
    print(chain, seq, head)
for chain, seq, why in sorted(faults): print("chain %s: record %d %s" % (chain, seq, why))
sys.exit(1 if faults else 0)
