//! The example of the README.
#![expect(clippy::print_stdout, reason = "it shows what the API answered")]

use token_broker_client::{AuthorizedClient, TokenClient};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let client = TokenClient::from_env()?; // Make one, and clone it.
    let api = AuthorizedClient::new(reqwest::Client::builder(), client.clone(), "acme")?;
    let base = client.token("acme").await?.api_base_url().to_owned();
    let answer = api.send(api.get(format!("{base}/whoami"))).await?;
    println!("{}", answer.status());
    Ok(())
}
