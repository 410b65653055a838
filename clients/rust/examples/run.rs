use std::io::Write;

use futures_util::StreamExt;
use polydev_client::{Address, Client, Identity, api};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address: Address = std::env::var("POLYDEV_ADDRESS")?.parse()?;
    let client = Client::connect(&address, Identity::default()).await?;

    let mut run = client.run(api::RunStart {
        provider: "anthropic".into(),
        user_id: "alice".into(),
        command: Some(api::run_start::Command::Argv(api::Argv {
            text: ["sh", "-c", "tr a-z A-Z; exit 3"].map(String::from).into(),
            ..Default::default()
        })),
        stdin: true,
        ..Default::default()
    });
    let input = run.input();
    input.write("hello").await?;
    input.close();

    let mut stdout = std::io::stdout();
    while let Some(event) = run.next().await {
        match event? {
            api::run_event::Event::Stdout(output) => stdout.write_all(&output.data)?,
            api::run_event::Event::Exited(exited) => {
                writeln!(stdout, "\nexit {}", exited.exit_code)?;
            }
            _ => {}
        }
    }
    Ok(())
}
