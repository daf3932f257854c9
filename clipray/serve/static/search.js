// The search page: images that are chosen, dropped or pasted, and the wait for the model.

const form = document.getElementById("search");

document.getElementById("image").addEventListener("change", (event) => searchWith(event.target.files));
document.addEventListener("paste", onPaste);
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, onDrag);
for (const name of ["dragleave", "drop"]) document.addEventListener(name, onDrag);
document.addEventListener("drop", (event) => searchWith(event.dataTransfer.files));
if (document.querySelector("[data-waits]")) waitForModel();
if (matchMedia("(min-width: 52rem)").matches) document.querySelector("#filters details").open = true;

function onDrag(event) {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  const leaves = event.type === "drop" || (event.type === "dragleave" && !event.relatedTarget);
  document.body.classList.toggle("dropping", !leaves);
}

function onPaste(event) {
  const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (images.length) {
    event.preventDefault();
    searchWith(images);
  }
}

// Uploads the files, and goes to the query with them in it.
async function searchWith(files) {
  if (!files.length) return;
  say(`Uploading ${files.length === 1 ? "the image" : `${files.length} images`} …`);
  const address = new URL(location.href);
  address.searchParams.delete("offset");
  try {
    for (const file of files) address.searchParams.append("image", await upload(file));
    location.assign(address);
  } catch (error) {
    say(error.message, true);
  }
}

async function upload(file) {
  const answer = await fetch("/api/images", { method: "POST", body: file }).catch(() => {
    throw new Error(`${file.name}: the server did not take it`);
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(`${file.name}: ${body.error}`);
  return body.image;
}

// A line above the results.
function say(text, isError = false) {
  const line = document.createElement("p");
  line.className = isError ? "error" : "wait";
  line.setAttribute("role", isError ? "alert" : "status");
  line.textContent = text;
  document.querySelectorAll("#results > .wait, #results > .error").forEach((old) => old.remove());
  document.getElementById("results").prepend(line);
}

async function waitForModel() {
  const run = new URL(location.href).searchParams.get("run");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 700));
    try {
      const { runs } = await (await fetch("/api/status")).json();
      const mine = runs.find((each) => each.run === run) ?? runs[0];
      if (mine.state !== "loading") return location.reload();
    } catch {
      say("The server does not answer. Is it still running?", true);
    }
  }
}

form.addEventListener("submit", () => {
  // Fields without a value stay out of the address.
  form.querySelectorAll("input, select").forEach((field) => { field.disabled ||= !field.value; });
});
addEventListener("pageshow", () => {
  form.querySelectorAll("input, select").forEach((field) => { field.disabled = false; });
});
