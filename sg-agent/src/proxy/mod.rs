//! stub
use crate::apply::Snapshot;
use crate::model::{InstanceId, Warning};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tokio::sync::watch;
#[derive(Clone, Debug)]
pub struct PublishSpec {
    pub instance: InstanceId,
}
impl PublishSpec {
    pub fn new(instance: InstanceId, _h: u16, _p: u16) -> Self {
        Self { instance }
    }
}
impl std::str::FromStr for PublishSpec {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(Self { instance: s.into() })
    }
}
pub struct Published;
impl From<PublishSpec> for Published {
    fn from(_: PublishSpec) -> Self {
        Self
    }
}
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PortStatus {
    pub host_port: u16,
    pub instance: String,
    pub port: u16,
    pub accepted: u64,
    pub refused: u64,
    pub active: u64,
}
pub struct Proxy;
impl Proxy {
    pub fn new(_: watch::Receiver<Arc<Snapshot>>, _: u32) -> Self {
        Self
    }
    pub fn reconcile(&mut self, _: Vec<Published>) -> Vec<Warning> {
        vec![]
    }
    pub fn status(&self) -> Vec<PortStatus> {
        vec![]
    }
    pub async fn shutdown(&mut self) {}
}
