// Asks the server; one error type, whose message is fit to be shown.

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let token = sessionStorage.getItem("dsd-token");
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  token = given;
  sessionStorage.setItem("dsd-token", token);
  history.replaceState(null, "", location.pathname); // out of the address bar and the history
}

async function askForToken() {
  const dialog = document.getElementById("ask");
  document.getElementById("token-wrong").hidden = !token;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  const entered = document.getElementById("token").value.trim();
  if (dialog.returnValue !== "ok" || !entered)
    throw new ApiError(401, "unauthorized", "This server answers only with its token. Load the page again to enter it.");
  token = entered;
  sessionStorage.setItem("dsd-token", token);
}

let asking = null;

export async function ask(method, path, body, signal) {
  for (let tried = 0; ; tried++) {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const options = { method, headers, signal };
    if (body instanceof FormData) options.body = body;
    else if (body !== undefined) {
      options.body = JSON.stringify(body);
      headers["Content-Type"] = "application/json";
    }
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "gone", "The server does not answer. Is it still running?");
    }
    if (answer.status === 401) {
      asking ??= askForToken().finally(() => (asking = null));
      await asking;
      continue;
    }
    const again = method === "GET" || path.startsWith("/v1/"); // what changes nothing on the server
    if ((answer.status === 429 || answer.status === 503) && tried < 5 && again && !(await late(answer))) {
      const wait = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
      continue;
    }
    if (answer.headers.get("Content-Type")?.startsWith("application/json")) {
      const values = await answer.json();
      if (answer.ok) return values;
      throw new ApiError(answer.status, values.error?.code ?? "fault", values.error?.message ?? "The server failed.");
    }
    if (!answer.ok) throw new ApiError(answer.status, "fault", `The server answered ${answer.status}.`);
    return answer.blob();
  }
}

// A request that took too long would do so again.
async function late(answer) {
  try {
    return (await answer.clone().json()).error.code === "timeout";
  } catch {
    return false;
  }
}

export const post = (path, body, signal) => ask("POST", path, body, signal);
export const get = (path, signal) => ask("GET", path, undefined, signal);
