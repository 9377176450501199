"""A rule comes and goes, and right after each call a new connection must meet it. Without a pause, by boto3."""

import socket
import sys

import boto3

SILENCE = 0.1


def sent_again():
    """How many SYNs were sent a second time in this namespace."""
    with open("/proc/thread-self/net/netstat") as table:
        names, values = [line.split() for line in table if line.startswith("TcpExt:")]
    return int(values[names.index("TCPSynRetrans")])


def connects(address, patience):
    """Whether it does, and how many SYNs were sent. On a machine that is busy the kernel may send a second one, until the
    socket is closed."""
    before = sent_again()
    with socket.socket() as client:
        client.settimeout(patience)
        try:
            client.connect(address)
            connected = True
        except TimeoutError:
            connected = False
    return connected, 1 + sent_again() - before


def main(endpoint, group, host, port, rounds):
    credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    ec2 = boto3.client("ec2", endpoint_url=endpoint, region_name="us-east-1", **credentials)
    address, wrong, denied = (host, int(port)), 0, 0
    rule = [{"IpProtocol": "tcp", "FromPort": int(port), "ToPort": int(port), "IpRanges": [{"CidrIp": "203.0.113.9/32"}]}]
    for _ in range(int(rounds)):
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rule)
        wrong += not connects(address, 30)[0]
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rule)
        connected, sent = connects(address, SILENCE)
        wrong += connected
        denied += sent
    # Who counts as many denied packets knows that none of those that were to pass was among them.
    print(f"{rounds} rounds, {wrong} wrong outcomes, {denied} packets denied")


main(*sys.argv[1:])
