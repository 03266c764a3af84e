# Prepares L1 for `lab bench recovery`: QEMU's tools, `answer`, which times a VMM's start, and QEMU's monitor.
set -e
mkdir -p /bench
mount -o ro /dev/vdb /bench

cat >/bin/answer <<'END'
#!/bin/sh
# answer SERIAL: starts /tmp/vmm as after a power-up, with nothing in the page cache; seconds until its guest has printed a whole link.
# L1 has one CPU: whoever waits must not take it from the guest. So nothing is forked but a sleep now and then.
touch $1
exec 5<$1
while read -r line; do :; done <&5
sync
echo 3 >/proc/sys/vm/drop_caches
read -r begun _ </proc/uptime
PERDURE_POOL=/pool/pool PERDURE_LOG=warn setsid /tmp/vmm </dev/null >/tmp/vmm.log 2>&1 5<&- &
vmm=$!
echo $vmm >/tmp/vmm.pid
start=
while :; do
    if ! read -r rest <&5; then
        start=$start$rest
        sleep 0.05
        [ -d /proc/$vmm ] || { cat /tmp/vmm.log $1 >&2; exit 1; }
        continue
    fi
    line=$start$rest start=
    # What comes first may be the rest of a link.
    case $line in "chain "[0-9]*" "[0-9a-f]*" "[0-9]*) break ;; esac
done
read -r now _ </proc/uptime
echo "$begun $now" | awk '{ print $2 - $1 }'
END
cat >/bin/monitor <<'END'
#!/bin/sh
# monitor SECONDS COMMAND: QEMU's monitor, and what it says within that time.
(echo "$2"; sleep $1) | timeout $(($1 + 60)) nc 127.0.0.1 4444 | tr -d '\r'
END
cat >/bin/save <<'END'
#!/bin/sh
# Saves QEMU's guest, both ways.
monitor 5 'savevm one' >/tmp/save.log
for try in $(seq 60); do monitor 1 'info snapshots' >/tmp/snapshots; grep -q one /tmp/snapshots && break; done
grep -q one /tmp/snapshots || { cat /tmp/save.log /tmp/snapshots; exit 1; }
monitor 1 'migrate -d file:/pool/incoming' >>/tmp/save.log
for try in $(seq 120); do monitor 1 'info migrate' >/tmp/migrate; grep -q 'completed\|failed' /tmp/migrate && break; done
grep -q completed /tmp/migrate || { cat /tmp/save.log /tmp/migrate; exit 1; }
sync
END
cat >/bin/quit <<'END'
#!/bin/sh
# The end of the VMM, as abrupt as an outage.
vmm=$(cat /tmp/vmm.pid)
kill -9 $vmm
for try in $(seq 100); do [ -d /proc/$vmm ] || exit 0; sleep 0.1; done
echo "VMM $vmm does not end: $(cat /proc/$vmm/status)"
exit 1
END
chmod 755 /bin/answer /bin/monitor /bin/save /bin/quit
mkdir -p /pool/pool
