# Boots Debian's systemd in namespaces of its own, with journald, the agent's unit and nothing else. The root is a tmpfs with
# this machine's /usr, read-only. Called as: unit.sh ROOT FILES CGROUP, in new mount, PID, UTS, IPC and network namespaces.
set -eu
root=$1 files=$2 cgroup=$3
mount --make-rprivate /
mount -t tmpfs root "$root"
cd "$root"
mkdir -p usr etc/systemd/system/multi-user.target.wants etc/default proc sys dev run var/log tmp root opt old cgroup
mount --bind /usr usr
mount -o remount,bind,ro usr
for name in bin sbin lib lib64; do ln -s "usr/$name" "$name"; done
cp /etc/passwd /etc/group /etc/ld.so.cache etc/
head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >etc/machine-id
cp "$files/sg-agent" opt/
cp "$files/options" etc/default/sg-agent
cp "$files/sg-agent.service" etc/systemd/system/
mkdir etc/systemd/system/sg-agent.service.d
cp "$files/test.conf" etc/systemd/system/sg-agent.service.d/
cp "$files/rules.json" etc/rules.json
for unit in basic sysinit shutdown umount final exit multi-user network sockets timers paths slices local-fs \
    local-fs-pre swap; do
    cp "/usr/lib/systemd/system/$unit.target" etc/systemd/system/
done
cp /usr/lib/systemd/system/systemd-journald.service /usr/lib/systemd/system/systemd-journald*.socket \
    /usr/lib/systemd/system/systemd-exit.service etc/systemd/system/
ln -s ../sg-agent.service ../systemd-journald.service etc/systemd/system/multi-user.target.wants/

# Its own cgroup is the root of what it sees.
mount -t cgroup2 cgroup cgroup
mkdir "cgroup/$cgroup"
echo $$ >"cgroup/$cgroup/cgroup.procs"
umount cgroup
mount -t proc proc proc
mount -t sysfs sys sys
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs dev dev
for name in null zero full random urandom tty; do
    : >"dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs run run
pivot_root . old
cd /
umount -l old
exec unshare --cgroup sh -c '
    mount -t cgroup2 cgroup /sys/fs/cgroup
    exec env -i container=sg-test PATH=/usr/sbin:/usr/bin SYSTEMD_UNIT_PATH=/etc/systemd/system \
        /usr/lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=0'
