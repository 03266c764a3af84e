# Prepares L1 for `lab bench devices`: the tools, a tap and an image for each guest, the peer, and `load`.
set -e
mkdir -p /bench
mount -o ro /dev/vdb /bench
mount -t debugfs debugfs /sys/kernel/debug
# The page cache is the disk here: what L1's own disk makes of it is not what is compared.
echo 0 >/proc/sys/vm/dirty_writeback_centisecs
echo 90 >/proc/sys/vm/dirty_ratio
echo 80 >/proc/sys/vm/dirty_background_ratio
# A connection starts as all do, and not with the round trip and the window (ssthresh) that the last one to that guest ended with: one that was held up
# would slow down its VMM's later rounds.
echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save
for number in 0 1; do
    tunctl -t vm$number >/dev/null
    ip addr add 10.0.$number.1/24 dev vm$number
    ip link set vm$number up
    dd if=/dev/zero of=/pool/disk$number bs=1M count=128 2>/dev/null
done
/bench/bin/iperf3 -s -D

cat >/bin/counters <<'END'
#!/bin/sh
# KVM's counters of a VMM's machine, and what the process itself took.
vmm=$(cat /tmp/vmm.$1)
for counter in /sys/kernel/debug/kvm/"$vmm"-*/*; do [ -d "$counter" ] || echo "${counter##*/} $(cat "$counter" 2>/dev/null)"; done
echo "sleeps $(cat /proc/$vmm/task/*/status | awk '/^voluntary/ { sum += $2 } END { print sum }')"
# User time has the guest's in it.
awk '{ print "user_ms", ($14 - $43) * 10; print "system_ms", $15 * 10; print "guest_ms", $43 * 10 }' /proc/$vmm/stat
END
cat >/bin/load <<'END'
#!/bin/sh
# load NUMBER WORDS...: has guest NUMBER run a load; its counters before and after, and the guest's answer.
number=$1
shift
echo before
counters $number
echo "$@" | timeout 170 nc 10.0.$number.2 5000 >/tmp/answer.$number
echo after
counters $number
echo answer
cat /tmp/answer.$number
END
chmod 755 /bin/counters /bin/load
