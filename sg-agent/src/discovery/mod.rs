//! stub
use crate::model::{EniId, InstanceId};
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub instance: InstanceId,
    pub account: Option<Arc<str>>,
    pub region: Option<Arc<str>>,
    pub eni: Option<EniId>,
    pub device_index: u32,
    pub link: Link,
    pub mac: [u8; 6],
    pub addresses: Vec<IpAddr>,
    pub networks: Vec<IpNet>,
    pub gateways: Vec<IpAddr>,
}
