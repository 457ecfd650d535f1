//! Tokens, for those who may do everything.

use std::{sync::Arc, time::Duration};

use shanty_access::Role;
use shanty_proto::v1::{self, access_service_server::AccessService, *};
use tonic::{Request, Response, Status};

use super::{refuse, wire};
use crate::{
    access::{Access, TokenRecord, Wanted},
    engine::Engine,
    error::{Error, Result},
    store::Store,
};

/// The access service.
pub(crate) struct Tokens {
    pub engine: Engine,
    pub store: Store,
    pub access: Arc<Access>,
}

impl Tokens {
    async fn create(&self, request: CreateTokenRequest) -> Result<CreateTokenResponse> {
        let role = match request.role() {
            v1::Role::Unspecified => return Err(Error::bad("a token of no role")),
            v1::Role::Read => Role::Read,
            v1::Role::Submit => Role::Submit,
            v1::Role::Worker => Role::Worker,
            v1::Role::Admin => Role::Admin,
        };
        let job = match request.job_id.as_str() {
            "" => None,
            text => {
                let job = wire::job_id(text)?;
                let known = self.engine.look({
                    let job = job.clone();
                    move |machine, _| machine.spec(&job).is_some()
                });
                if !known.await? {
                    return Err(Error::NoSuchJob { job });
                }
                Some(job)
            }
        };
        let lifetime = (request.lifetime_seconds > 0).then(|| Duration::from_secs(request.lifetime_seconds));
        let wanted = Wanted { role, name: request.name, job, lifetime };
        let (record, secret) = self.access.create(&self.store, wanted).await?;
        Ok(CreateTokenResponse { token: Some(token_out(&record)), secret: secret.expose().to_owned() })
    }

    async fn revoke(&self, request: RevokeTokenRequest) -> Result<RevokeTokenResponse> {
        let revoked = self.access.revoke(&self.store, &request.token).await?;
        Ok(RevokeTokenResponse { revoked: revoked.iter().map(token_out).collect() })
    }
}

#[tonic::async_trait]
impl AccessService for Tokens {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        self.create(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn list_tokens(
        &self,
        _: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let tokens = self.access.list().iter().map(token_out).collect();
        Ok(Response::new(ListTokensResponse { tokens }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        self.revoke(request.into_inner()).await.map(Response::new).map_err(refuse)
    }
}

fn token_out(record: &TokenRecord) -> Token {
    let role = match record.role {
        Role::Read => v1::Role::Read,
        Role::Submit => v1::Role::Submit,
        Role::Worker => v1::Role::Worker,
        Role::Admin => v1::Role::Admin,
    };
    Token {
        id: record.id.to_string(),
        role: role.into(),
        name: record.name.clone(),
        job_id: record.job.clone().map(String::from).unwrap_or_default(),
        created_unix_ms: record.created_unix_ms,
        expires_unix_ms: record.expires_unix_ms.unwrap_or_default(),
    }
}
