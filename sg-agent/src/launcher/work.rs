//! What is done to one instance, from whatever there is to its goal. Each step can be done again: after an error, or
//! when the agent ends in the middle, the next attempt goes on from what it finds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bollard::errors::Error;
use tokio::sync::watch;

use super::engine::{Engine, Wire, is_taken};
use super::images::Images;
use super::network::{Net, Strays};
use super::plan::{Goal, Units};
use super::{LaunchError, files, holder};
use crate::apply::Snapshot;
use crate::discovery::names;
use crate::model::{InstanceId, VpcId, Warning};
use crate::source::{Ec2, Launch, LaunchInterface};

/// What all workers share.
pub(super) struct Context {
    pub(super) ec2: Arc<Ec2>,
    pub(super) images: Images,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Names of machine images. They never change.
    names: Mutex<BTreeMap<String, Option<String>>>,
    /// Ports that instances' images expose.
    exposed: Mutex<BTreeMap<InstanceId, BTreeSet<u16>>>,
    /// One at a time makes or removes networks.
    networks: tokio::sync::Mutex<()>,
    /// Networks that don't have their VPCs' addresses.
    strays: Mutex<Strays>,
    /// One at a time pulls, or makes, one image.
    pulls: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// What a worker is at, for people.
#[derive(Clone, Debug, Default)]
pub(super) struct Step(Arc<Mutex<String>>);

impl Step {
    fn is(&self, what: impl Into<String>) {
        *lock(&self.0) = what.into();
    }

    pub(super) fn text(&self) -> String {
        lock(&self.0).clone()
    }
}

/// One instance to be worked on.
pub(super) struct Job {
    pub(super) instance: InstanceId,
    pub(super) goal: Goal,
    /// What the control plane says of it; nothing of one that is gone.
    pub(super) launch: Option<Launch>,
    /// The addresses of all instances: nobody else gets one of them.
    pub(super) taken: Arc<BTreeSet<Ipv4Addr>>,
    pub(super) step: Step,
}

impl Context {
    pub(super) fn new(ec2: Arc<Ec2>, images: Images, snapshots: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self {
            ec2,
            images,
            snapshots,
            names: Mutex::default(),
            exposed: Mutex::default(),
            networks: tokio::sync::Mutex::default(),
            strays: Mutex::default(),
            pulls: Mutex::default(),
        }
    }

    /// The ports that an instance's image exposes, as far as that is known.
    pub(super) fn exposed(&self, instance: &InstanceId) -> BTreeSet<u16> {
        lock(&self.exposed).get(instance).cloned().unwrap_or_default()
    }

    /// Brings an instance to its goal; whether its own container was started.
    pub(super) async fn work(&self, engine: &Engine, job: &Job) -> Result<bool, LaunchError> {
        let units = engine.units(&job.instance).await?;
        match (job.goal, &job.launch) {
            (Goal::Run | Goal::Reboot, Some(launch)) => self.run(engine, job, launch, units).await,
            (Goal::Stop, _) => {
                job.step.is("it is being stopped");
                // A look from before the last stop asks for another.
                if let Some(own) = units.own.filter(|own| own.running) {
                    engine.stop(&own.id).await?;
                    tracing::info!("{}: stopped", job.instance);
                }
                Ok(false)
            }
            _ => {
                job.step.is("its containers are being removed");
                for unit in units.own.into_iter().chain(units.holder) {
                    engine.remove(&unit.id).await?;
                }
                lock(&self.exposed).remove(&job.instance);
                tracing::info!("{}: its containers are removed: it is no more", job.instance);
                Ok(false)
            }
        }
    }

    async fn run(&self, engine: &Engine, job: &Job, launch: &Launch, units: Units) -> Result<bool, LaunchError> {
        names::id(&launch.instance.0).map_err(LaunchError::Name)?;
        let image = self.image(engine, job, launch).await?;
        job.step.is("its network is being set up");
        let (holder, own) = self.hold(engine, job, launch, units).await?;
        let wires = self.wire(engine, job, launch, &holder).await?;
        let units = engine.units(&launch.instance).await?;
        if let Some(own) = &own
            && engine.is_apart(&units).await?
        {
            engine.stop(own).await?;
        }
        // From here on nothing of the instance runs before its rules are in force.
        job.step.is("its container waits for its link to be enforced");
        let links = engine.links(&holder, &wires).await?;
        self.enforced(launch, &links).await;

        job.step.is("its container is being started");
        let own = match own {
            Some(own) => own,
            None => engine.make(launch, &image, &holder).await?,
        };
        if engine.is_fresh(&own).await? {
            self.furnish(engine, launch, &own).await?;
        }
        let was_running = engine.units(&launch.instance).await?.own.is_some_and(|own| own.running);
        if job.goal == Goal::Reboot && was_running {
            engine.restart(&own).await?;
            tracing::info!("{}: rebooted", launch.instance);
        } else if !was_running {
            engine.start(&own).await?;
            let address = wires.first().map(|wire| wire.address.to_string()).unwrap_or_default();
            tracing::info!(image, address, "{}: started", launch.instance);
        }
        self.run_user_data(engine, launch, &own).await?;
        self.write_back(launch, &wires).await?;
        Ok(!was_running)
    }

    /// The image of an instance, which is there then.
    async fn image(&self, engine: &Engine, job: &Job, launch: &Launch) -> Result<String, LaunchError> {
        let image = match self.images.by_id(&launch.ami) {
            Some(image) => image.to_owned(),
            None => {
                let known = lock(&self.names).get(&launch.ami).cloned();
                let name = match known {
                    Some(name) => name,
                    None => self.ec2.image_name(&launch.ami).await?,
                };
                lock(&self.names).insert(launch.ami.clone(), name.clone());
                self.images.by_name(&launch.ami, name.as_deref()).to_owned()
            }
        };
        job.step.is(format!("its image {image} is being looked for"));
        if !engine.has_image(&image).await? {
            let _turn = self.turn(&image).await;
            // Another may have had its turn before.
            if !engine.has_image(&image).await? {
                engine.pull(&image, |progress| job.step.is(progress)).await?;
            }
        }
        if !engine.has_image(holder::IMAGE).await? {
            let _turn = self.turn(holder::IMAGE).await;
            if !engine.has_image(holder::IMAGE).await? {
                engine.make_holder().await?;
            }
        }
        let exposed = engine.exposed(&image).await?;
        lock(&self.exposed).insert(launch.instance.clone(), exposed);
        Ok(image)
    }

    /// Waits for those who pull this image.
    async fn turn(&self, image: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let turns = Arc::clone(lock(&self.pulls).entry(image.to_owned()).or_default());
        turns.lock_owned().await
    }

    /// Makes sure that the holder runs; its id, and that of the instance's own container, if there is one.
    async fn hold(
        &self,
        engine: &Engine,
        job: &Job,
        launch: &Launch,
        units: Units,
    ) -> Result<(String, Option<String>), LaunchError> {
        let own = units.own.map(|own| own.id);
        if let Some(holder) = units.holder {
            if holder.running {
                return Ok((holder.id, own));
            }
            // What runs in the namespace that is gone can reach nobody.
            if let Some(own) = &own {
                engine.stop(own).await?;
            }
            // Of several networks Docker joins one after the other in no order: the interfaces would change places.
            for network in self.later_networks(engine, launch).await? {
                engine.disconnect(&network.name, &holder.id).await?;
            }
            match engine.start(&holder.id).await {
                Ok(()) => return Ok((holder.id, own)),
                Err(error) => {
                    tracing::warn!(%error, "{}: its network is made anew", launch.instance);
                    engine.remove(&holder.id).await?;
                }
            }
        }
        // Its namespace was the holder's that is no more, and Docker gives it no other.
        if let Some(own) = own {
            tracing::warn!("{}: its network was removed, so its container is made anew", launch.instance);
            engine.remove(&own).await?;
        }
        let primary = launch.interfaces.first().ok_or(LaunchError::NoInterface)?;
        let net = {
            let _turn = self.networks.lock().await;
            self.network(engine, primary, 0).await?
        };
        let candidates = engine.candidates(&net, &primary.addresses, &job.taken).await?;
        let holder = first_free(&net, candidates, |address| engine.hold(launch, &net.name, address)).await?;
        Ok((holder, None))
    }

    /// Makes sure that the holder has all interfaces; what it has, in their order.
    async fn wire(&self, engine: &Engine, job: &Job, launch: &Launch, holder: &str) -> Result<Vec<Wire>, LaunchError> {
        let later = self.later_networks(engine, launch).await?;
        let joined = engine.wires(holder).await?;
        for (net, interface) in later.iter().zip(launch.interfaces.iter().skip(1)) {
            if !joined.contains_key(&net.name) {
                let candidates = engine.candidates(net, &interface.addresses, &job.taken).await?;
                first_free(net, candidates, |address| engine.connect(&net.name, holder, address)).await?;
            }
        }
        // An interface that was detached.
        let mut wires = engine.wires(holder).await?;
        let surplus: Vec<String> = wires
            .keys()
            .filter(|name| joined.contains_key(*name) && later.iter().all(|net| net.name != **name))
            .cloned()
            .collect();
        let primary = launch.interfaces.first().ok_or(LaunchError::NoInterface)?;
        let first = {
            let _turn = self.networks.lock().await;
            self.network(engine, primary, 0).await?
        };
        for network in surplus.into_iter().filter(|name| *name != first.name) {
            engine.disconnect(&network, holder).await?;
            wires.remove(&network);
        }
        let order = std::iter::once(&first.name).chain(later.iter().map(|net| &net.name));
        let wires: Option<Vec<Wire>> = order.map(|name| wires.remove(name).flatten()).collect();
        wires.ok_or(LaunchError::NotWired)
    }

    /// The network of an interface's VPC; notes whether it has the VPC's addresses. Callers take turns.
    async fn network(&self, engine: &Engine, interface: &LaunchInterface, plane: usize) -> Result<Net, LaunchError> {
        let net = engine.network(&interface.vpc, interface.network, plane).await?;
        if let Some(cidr) = interface.network.filter(|_| plane == 0) {
            lock(&self.strays).note(&interface.vpc, cidr, &net);
        }
        Ok(net)
    }

    /// The networks of all interfaces but the primary one.
    async fn later_networks(&self, engine: &Engine, launch: &Launch) -> Result<Vec<Net>, LaunchError> {
        let mut planes: BTreeMap<&VpcId, usize> = BTreeMap::new();
        let mut nets = Vec::new();
        let _turn = self.networks.lock().await;
        for (index, interface) in launch.interfaces.iter().enumerate() {
            let plane = planes.entry(&interface.vpc).and_modify(|plane| *plane += 1).or_insert(0);
            if index > 0 {
                nets.push(self.network(engine, interface, *plane).await?);
            }
        }
        Ok(nets)
    }

    /// Returns when every link of the holder has its programs and the control plane's rules. By index, as a link that a
    /// restart replaced had the same addresses, and may be in the last snapshot still.
    async fn enforced(&self, launch: &Launch, links: &[u32]) {
        let mut snapshots = self.snapshots.clone();
        let is_enforced = |snapshot: &Arc<Snapshot>| {
            links.iter().all(|link| {
                snapshot.interfaces.get(link).is_some_and(|enforced| {
                    let interface = &enforced.interface;
                    interface.instance == launch.instance && enforced.attached && interface.eni.is_some()
                })
            })
        };
        // An error means that the agent ends.
        if snapshots.wait_for(is_enforced).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Puts into a container what an instance finds at its first start. What can't be is left out, and told.
    async fn furnish(&self, engine: &Engine, launch: &Launch, own: &str) -> Result<(), LaunchError> {
        let instance = &launch.instance;
        let key = match &launch.key {
            Some(name) => self.ec2.public_key(name).await?,
            None => None,
        };
        let key = match key.as_deref().map(files::public_key) {
            Some(Ok(key)) => Some(key),
            Some(Err(problem)) => {
                tracing::warn!("{instance}: it gets no key: {problem}");
                None
            }
            None => {
                if let Some(name) = &launch.key {
                    tracing::warn!("{instance}: the endpoint has no public key of its pair {}", name.escape_default());
                }
                None
            }
        };
        let data = self.ec2.user_data(instance).await?;
        let script = match data.as_deref().map(files::script) {
            Some(Ok(script)) => Some(script),
            Some(Err(problem)) => {
                tracing::warn!("{instance}: its user data is not run: {problem}");
                None
            }
            None => None,
        };
        let keys = match key {
            Some(_) => engine.read(own, files::AUTHORIZED_KEYS).await?,
            None => None,
        };
        let keys = keys.as_deref().map(files::first_text).unwrap_or_default();
        let archive = files::archive(&keys, key, script).map_err(LaunchError::Archive)?;
        Ok(engine.upload(own, archive).await?)
    }

    /// Runs the user data, if it wasn't run yet. The mark is made first: an agent that ends in between leaves a script
    /// that didn't run, and none runs twice.
    async fn run_user_data(&self, engine: &Engine, launch: &Launch, own: &str) -> Result<(), LaunchError> {
        if !engine.has(own, files::SCRIPT).await? || engine.has(own, files::DONE).await? {
            return Ok(());
        }
        let script = engine.ready_script(own).await?;
        engine.upload(own, files::done().map_err(LaunchError::Archive)?).await?;
        Ok(engine.start_script(script, &launch.instance).await?)
    }

    /// Tells the control plane of addresses that it doesn't know.
    async fn write_back(&self, launch: &Launch, wires: &[Wire]) -> Result<(), LaunchError> {
        for (wire, interface) in wires.iter().zip(&launch.interfaces) {
            if !interface.addresses.contains(&wire.address) {
                self.ec2.assign_address(&interface.eni, wire.address).await?;
                tracing::info!(
                    eni = %interface.eni, address = %wire.address,
                    "{}: has this address: none that it was given is to be had in its network", launch.instance
                );
            }
        }
        Ok(())
    }

    /// A warning for each VPC whose instances don't have its addresses.
    pub(super) fn strays(&self, in_use: &BTreeSet<VpcId>) -> Vec<Warning> {
        lock(&self.strays).warnings(in_use)
    }

    /// Removes networks of VPCs without instances.
    pub(super) async fn sweep(&self, engine: &Engine, in_use: &BTreeSet<VpcId>) -> Result<(), Error> {
        let _turn = self.networks.lock().await;
        engine.sweep(in_use).await
    }
}

/// Tries addresses until one isn't somebody else's.
async fn first_free<T, F: Future<Output = Result<T, Error>>>(
    net: &Net,
    candidates: Vec<Ipv4Addr>,
    mut attempt: impl FnMut(Ipv4Addr) -> F,
) -> Result<T, LaunchError> {
    for address in candidates {
        match attempt(address).await {
            Err(error) if is_taken(&error) => {}
            done => return Ok(done?),
        }
    }
    Err(LaunchError::Network { name: net.name.clone(), problem: "no address of it is free".to_owned() })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
