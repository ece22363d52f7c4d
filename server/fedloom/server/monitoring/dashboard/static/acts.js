// What an operator may do. Everything is asked twice, and the harmless answer has the focus.

const $ = (id) => document.getElementById(id);
const ACTS = {
  stop: {
    title: () => "Stop the coordinator?",
    text: "It ends as it does for SIGTERM. Nothing it has acknowledged is lost: started again with the same state directory, the run goes on.",
    no: "Keep it running",
    yes: "Stop",
  },
  finish: {
    title: () => "Finish this run now?",
    text: "No more rounds come: clients get the adapter of the rounds that are committed, and the run is over for good. What the open round has is dropped.",
    no: "Go on",
    yes: "Finish now",
  },
  invite: {
    title: () => "Invite a client",
    text: "Makes a join token, good once and for 24 hours. A client of this name that has enrolled before is replaced once the token is used.",
    no: "Cancel",
    yes: "Make the token",
  },
  revoke: {
    title: (name) => `Revoke ${name}?`,
    text: "Its certificates and invites are refused from now on, and it is put out of the run within seconds. It needs a new invite to come back.",
    no: "Keep it",
    yes: "Revoke",
  },
};
let act = "";
let about = "";

export function sure(name, whom = "") {
  [act, about] = [name, whom];
  const words = ACTS[act];
  $("sure-title").textContent = words.title(whom);
  $("sure-text").textContent = words.text;
  $("sure-cancel").textContent = words.no;
  $("sure-yes").textContent = words.yes;
  $("sure-yes").className = act === "invite" ? "button primary" : "button danger";
  $("sure-yes").hidden = false;
  $("sure-field").hidden = act !== "invite";
  $("sure-token").hidden = true;
  $("sure-wrong").textContent = "";
  $("sure-name").value = "";
  $("ask-sure").showModal();
}

// `post` sends one action, `done` is called after each.
export function listenActs(post, done) {
  for (const name of ["stop", "finish", "invite"]) $(name).addEventListener("click", () => sure(name));
  $("sure-cancel").addEventListener("click", () => $("ask-sure").close());
  $("ask-sure").addEventListener("close", () => {
    $("sure-token").value = ""; // it is shown once
  });
  $("sure-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await post(`/api/${act}`, { name: act === "invite" ? $("sure-name").value.trim() : about });
    const told = await answer.json();
    if (!answer.ok) $("sure-wrong").textContent = told.error;
    else if (act === "invite") token(told);
    else $("ask-sure").close();
    done();
  });
}

function token({ name, token: text }) {
  $("sure-text").textContent = `Hand this line to ${name} by a way that nobody else can read. It is not shown again. There: fedloom certs enrol TOKEN --server HOST:PORT --policy client.toml`;
  $("sure-field").hidden = $("sure-yes").hidden = true;
  $("sure-wrong").textContent = "";
  $("sure-token").hidden = false;
  $("sure-token").value = text;
  $("sure-token").select();
  $("sure-cancel").textContent = "Done";
}
