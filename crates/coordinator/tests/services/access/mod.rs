//! Who may do what, from outside.

mod certificates;
mod doors;
mod rights;
mod tokens;

use std::{collections::BTreeMap, path::Path};

use shanty_access::{Channel, Credentials, NewToken, Role, Secret};
use shanty_coordinator::Options;
use tonic::transport::Endpoint;
use url::Url;

use super::crew::{Server, options};

/// One token a role.
pub struct Keys(BTreeMap<Role, Secret>);

impl Keys {
    fn draw() -> Self {
        Self(Role::ALL.into_iter().map(|role| (role, NewToken::draw().unwrap().secret)).collect())
    }

    fn all(&self) -> Vec<(&Secret, Role)> {
        self.0.iter().map(|(role, secret)| (secret, *role)).collect()
    }

    fn of(&self, role: Role) -> Credentials {
        with_token(&self.0[&role])
    }
}

fn with_token(secret: &Secret) -> Credentials {
    Credentials { token: Some(secret.clone()), ..Credentials::default() }
}

/// A coordinator that asks everybody who it is.
fn closed(folder: &Path) -> Options {
    Options { insecure: false, ..options(folder) }
}

async fn start(folder: &Path, options: Options) -> (Server, Keys) {
    let keys = Keys::draw();
    (Server::start_with(folder, options, &keys.all()).await, keys)
}

async fn connect(server: &Server, credentials: &Credentials) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(server.url.clone()).unwrap();
    let (endpoint, bearer) = credentials.prepare(&Url::parse(&server.url).unwrap(), endpoint).unwrap();
    let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
    Ok(Channel::new(channel, bearer))
}
