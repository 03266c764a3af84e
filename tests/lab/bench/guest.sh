#!/bin/busybox sh
# Runs in the guests of `lab bench devices`.
#   sh bench.sh NETWORK         sets the guest up with NETWORK.2 as its address, and serves loads on port 5000
#   sh bench.sh load NETWORK    reads a load from stdin, runs it, and answers: the frames that its card sent and received, and the result
#                               KIND SECONDS ARGUMENT...
export PATH=/bin:/bench/bin

frames() { cat /sys/class/net/eth0/statistics/?x_packets | awk '{ sum += $1 } END { print sum }'; }

fio_for() { # SECONDS OPTION...
    seconds=$1
    shift
    fio --name=bench --size=128m --thread --gtod_reduce=1 --norandommap --time_based --runtime="$seconds" --output-format=json "$@"
}

# The same load program without a device: what the guest does anyway.
null() { fio_for "$1" --ioengine=null --rw=read --bs=4k --iodepth=1; }

block() { # SECONDS PATTERN SIZE DEPTH
    fio_for "$1" --filename=/dev/vda --direct=1 --ioengine=libaio --rw="$2" --bs="$3" --iodepth="$4"
}

net() { # SECONDS ARGUMENT...
    seconds=$1
    shift
    iperf3 -c "$network.1" -t "$seconds" -J "$@"
}

if [ "$1" = load ]; then
    network=$2
    read -r kind arguments
    before=$(frames)
    "$kind" $arguments >/tmp/result 2>/tmp/complaint
    echo $(($(frames) - before))
    cat /tmp/result /tmp/complaint
    exit
fi

network=$1
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
ip addr add "$network.2/24" dev eth0 && ip link set eth0 up && ping -c 1 "$network.1" >/dev/null || exit 1
printf '#!/bin/busybox sh\nexec /bin/busybox sh /bench.sh load %s\n' "$network" >/bin/load
chmod 755 /bin/load
# See L1's.
echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save
# The first run of each program reads it and links it: not part of a load.
block 1 read 4k 1 >/dev/null
iperf3 -c "$network.1" -t 1 >/dev/null
echo "bench: ready"
nc -ll -p 5000 -e /bin/load
