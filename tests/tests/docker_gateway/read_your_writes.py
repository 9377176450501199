"""A rule comes and goes, and right after each call a new connection must meet it. Without a pause, by boto3."""

import socket
import struct
import sys

import boto3

SILENCE = 0.1
RETRANSMISSIONS = 100  # tcpi_total_retrans in struct tcp_info


def connects(address, patience):
    """Whether it does, and how many SYNs were sent. On a machine that is busy the kernel may send a second one."""
    with socket.socket() as client:
        client.settimeout(patience)
        try:
            client.connect(address)
            connected = True
        except TimeoutError:
            connected = False
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return connected, 1 + struct.unpack_from("I", info, RETRANSMISSIONS)[0]


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
