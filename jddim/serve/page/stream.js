// Server-sent events of a POST: an EventSource can only GET. To abort the signal closes the connection, which the
// server takes as "drop this run".
export async function* events(url, data, signal) {
  const response = await ask(url, data, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (field("event")) yield { name: field("event"), data: JSON.parse(field("data")) };
    }
  }
}

export async function post(url, data, signal) {
  return (await ask(url, data, signal)).json();
}

async function ask(url, data, signal) {
  const response = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(data),
    signal,
  });
  if (!response.ok) throw await problem(response);
  return response;
}

async function problem(response) {
  const said = await response.json().catch(() => ({ error: `the server said ${response.status}` }));
  return Object.assign(new Error(said.error), { fields: said.fields });
}
