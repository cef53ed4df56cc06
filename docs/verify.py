#!/usr/bin/env python3
"""Verifies a Token Broker audit log without the broker. Needs only Python 3.8 and OpenSSL 3.

    python3 verify.py [--keys audit-keys.pem] [--heads audit-heads.jsonl] [--part] FILE...

FILE is the output of `audit export` or `audit tail --json`, or a segment of a journal. --keys takes the output of
`keys public --signing`, and --heads takes signed checkpoints. audit-format.md describes all of these. Of a part of a log
(an export with a filter, or anything else than an export), nobody can tell which records are missing: say --part.

Prints each chain with its last number and hash, then each fault, then how many checkpoints were compared with the
record that they name. Exits with 1 if there is a fault, if the files are a part of a log and --part is not given, or
if what was given holds no key or no checkpoint.
"""
import argparse, bisect, datetime, hashlib, json, re, subprocess, sys, tempfile

def net(value):
    """Returns a value as it is hashed: a netstring, or `-` if it is absent."""
    if value is None: return b"-"
    data = value if isinstance(value, bytes) else str(value).encode()
    return b"%d:%s," % (len(data), data)

def micros(at):
    """Returns a time as microseconds since 1970, or None if it is not written as in records."""
    if not re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}Z", at): return None
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    return (datetime.datetime.fromisoformat(at.replace("Z", "+00:00")) - epoch) // datetime.timedelta(microseconds=1)

def record_hash(e):
    """Computes the hash of a record from its values and the hash of the previous record."""
    pairs = sorted((k.encode(), v.encode()) for k, v in e.get("detail", {}).items())
    values = [e["instance"], e["chain"], e["seq"], micros(e["at"]), e["event"]]
    values += [e.get(k) for k in ("caller", "caller_kind", "peer", "account")] + [e["outcome"]]
    values += [e.get(k) for k in ("reason", "generation", "token_fingerprint", "trace_id", "latency_us")]
    canonical = b"".join(map(net, values + [e["count"], b"".join(net(k) + net(v) for k, v in pairs)]))
    return hashlib.sha256(b"token-broker audit event v1\n" + bytes.fromhex(e["prev_hash"]) + canonical).hexdigest()

def genuine(keys, kind, names, it):
    """Whether the signature of a checkpoint (`head`) or pruning receipt (`cut`) is valid. True without keys."""
    if not keys: return True
    values = [bytes.fromhex(it[n]) if "hash" in n else micros(it[n]) if n == "at" else it[n] for n in names]
    with tempfile.NamedTemporaryFile() as key, tempfile.NamedTemporaryFile() as message, tempfile.NamedTemporaryFile() as signature:
        for file, data in ((key, keys.get(it["key_id"], "").encode()), (signature, bytes.fromhex(it["signature"])),
                           (message, b"token-broker audit %s v1\n" % kind + b"".join(map(net, values)))):
            file.write(data); file.flush()
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key.name, "-rawin", "-in", message.name, "-sigfile", signature.name]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

# Read all lines: records, chains, pruning receipts (cuts) and signed checkpoints (heads).
arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--keys", action="append", default=[]); arguments.add_argument("--heads", action="append", default=[])
arguments.add_argument("--part", action="store_true")
arguments.add_argument("files", nargs="+")
given = arguments.parse_args()
keys = {}
for file in given.keys:
    found = dict(re.findall(r"# (\w+)\n(-----BEGIN[^#]*)", open(file).read()))
    if not found: sys.exit("there is no key in %s: nothing was verified" % file)
    keys.update(found)
chains, cuts, heads, records, faults, ends, lost, whole, compared = {}, {}, [], {}, [], {}, [], False, 0

def read(it):
    """Takes in one line. Raises an error of CANNOT_READ if it is not what it should be."""
    global whole
    def checked(part, texts, numbers, hashes, optional=()):
        for names, good in ((texts, lambda v: isinstance(v, str)), (numbers, lambda v: type(v) is int and 0 <= v < 2**63),
                            (hashes, lambda v: re.fullmatch("[0-9a-f]{64}", v))):
            for name in names:
                if not (name in optional and part.get(name) is None or good(part[name])): raise ValueError(name)
        return part
    whole = whole or it.get("audit_export", {}).get("whole", False) is True
    if "event" in it:
        checked(it, ("instance", "chain", "at", "event", "outcome"), ("seq",), ("prev_hash", "hash"))
        if not all(isinstance(v, str) for v in it.get("detail", {}).values()): raise ValueError("detail")
        if it["seq"] < 1: faults.append((it["chain"], it["seq"], "has an impossible number")); return
        altered = record_hash(it) != it["hash"]
        here = records.setdefault(it["chain"], {})
        if altered: faults.append((it["chain"], it["seq"], "was altered"))
        if it["seq"] in here: faults.append((it["chain"], it["seq"], "occurs twice"))
        here[it["seq"]] = (it["prev_hash"], it["hash"])
        # A record of what a replica has lost: see "Lost records" in audit-format.md.
        said = it.get("detail", {})
        if it["event"] == "audit_gap" and re.fullmatch("[0-9]{1,18}", said.get("lost_last", "")): lost.append((said.get("lost_chain", ""), int(said["lost_last"])))
    elif "unreadable" in it:
        row = it["unreadable"]
        faults.append((str(row["chain"]), int(row["seq"]), "cannot be read (%s): %s" % (row["table"], row["why"])))
    elif isinstance(it.get("chain"), dict):
        claim = checked(it["chain"], ("chain", "linked_chain"), ("last_seq",), ("linked_hash", "last_hash"), ("linked_chain", "last_seq", "last_hash"))
        chains[claim["chain"]] = claim
    elif "cut" in it:
        cut = checked(it["cut"], ("chain", "at", "key_id"), ("first_seq", "last_seq"), ("prev_hash", "hash"))
        if not 1 <= cut["first_seq"] <= cut["last_seq"]: raise ValueError("an impossible run of records")
        bytes.fromhex(cut["signature"]); cuts.setdefault(cut["chain"], {})[cut["first_seq"]] = cut
    elif "head" in it or "signature" in it:
        head = checked(it.get("head", it), ("chain", "at", "key_id"), ("seq",), ("hash",))
        bytes.fromhex(head["signature"]); heads.append(head)

CANNOT_READ = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
for file in given.files + given.heads:
    before, number, export, count, end = len(heads), 0, False, 0, None
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(64 << 20), b""), 1):
            end = None
            try:
                it = json.loads(line)
                read(it)
                export, count, end = export or number == 1 and "audit_export" in it, count + ("event" in it), it.get("end")
            except CANNOT_READ as error:
                # Checkpoints may be among other lines of a log.
                if file not in given.heads: faults.append(("", number, "of %s cannot be read: %s" % (file, type(error).__name__)))
    # The last line of an export says how many records it has.
    said = end.get("records") if isinstance(end, dict) else None
    if export and said is None: faults.append(("", number, "of %s is its last one, and not `end`: the file is incomplete" % file))
    elif export and said != count: faults.append(("", number, "of %s says that it has %s records, and it has %d" % (file, said, count)))
    if file in given.heads and len(heads) == before: sys.exit("there is no checkpoint in %s: nothing was verified" % file)
# Follow each chain from its first record to its last. A pruning receipt counts as one step.
for chain in sorted({*records, *cuts, *chains, *(h["chain"] for h in heads)}):
    here, gone, claim = records.get(chain, {}), cuts.get(chain, {}), chains.get(chain, {})
    seq, head = (0, claim["linked_hash"]) if whole and claim else (min([*here, *gone], default=1) - 1, None)
    steps, known, last = sorted({*here, *gone}), {seq: head}, max([*here, *(c["last_seq"] for c in gone.values()), claim.get("last_seq") or 0])
    if whole and not claim: faults.append((chain, 0, "belongs to an unknown chain"))
    for cut in gone.values():
        if not genuine(keys, b"cut", ("chain", "first_seq", "prev_hash", "last_seq", "hash", "at"), cut): faults.append((chain, cut["first_seq"], "has a pruning receipt with a wrong signature"))
        faults += [(chain, n, "is present, but a pruning receipt says that it was removed") for n in here if cut["first_seq"] <= n <= cut["last_seq"]]
    while seq < last:
        cut = gone.get(seq + 1)
        step = (cut["prev_hash"], cut["hash"]) if cut else here.get(seq + 1)
        if step and head not in (None, step[0]): faults.append((chain, seq, "is not the one that the next record follows"))
        if step: seq, head = (cut["last_seq"] if cut else seq + 1), step[1]
        else:
            # All records up to the next one that is present are missing.
            until = steps[bisect.bisect(steps, seq + 1)] - 1 if steps and steps[-1] > seq + 1 else last
            if whole: faults.append((chain, seq + 1, "is missing" if until == seq + 1 else "is missing, and so are those up to %d" % until))
            seq, head = until, None
        known[seq] = head
    if whole and claim and (seq, head) != (claim["last_seq"], claim["last_hash"]): faults.append((chain, seq, "is not the last record of the chain"))
    for h in (h for h in heads if h["chain"] == chain):
        compared += known.get(h["seq"]) is not None
        if not genuine(keys, b"head", ("chain", "seq", "hash", "at"), h): faults.append((chain, h["seq"], "has a checkpoint with a wrong signature"))
        if h["seq"] > seq: faults.append((chain, seq + 1, "is missing: a checkpoint of record %d was signed" % h["seq"]))
        elif (known.get(h["seq"]) or h["hash"]) != h["hash"]: faults.append((chain, h["seq"], "differs from the record whose checkpoint was signed"))
    ends[chain] = head
    if whole and not claim.get("retired") and seq < max((last for name, last in lost if name == chain), default=0): faults.append((chain, seq + 1, "is missing: the replica has lost it"))
    print(chain.encode("unicode_escape").decode(), seq, head)
# In a complete export, each chain begins with the last hash of the chain before it.
for chain, claim in chains.items() if whole else ():
    if claim["linked_hash"] != ends.get(claim["linked_chain"] or "", "0" * 64): faults.append((claim["linked_chain"] or chain, 0, "or the end of its chain is not where chain %s begins" % chain))
for chain, seq, why in sorted(faults):
    text = "chain %s: record %d %s" % (chain, seq, why) if chain else "line %d %s" % (seq, why)
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
print("%d of %d checkpoints were compared with their records" % (compared, len(heads)))
if not keys: print("signatures were not checked: use --keys", file=sys.stderr)
if not whole: print("a part of the log: missing records cannot be detected" + ("" if given.part else "; if that is what you mean, say --part"))
sys.exit(1 if faults or not (whole or given.part) else 0)
