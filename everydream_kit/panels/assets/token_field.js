// A password field whose content is sent as a message and never becomes widget state, which a notebook could save.
function render({ model, el }) {
  const form = document.createElement("form");
  form.className = "edk-token";
  const label = document.createElement("label");
  label.textContent = "Access token ";
  const input = document.createElement("input");
  input.type = "password"; input.autocomplete = "off"; input.placeholder = "hf_…"; input.required = true;
  const button = document.createElement("button");
  button.type = "submit"; button.textContent = "Log in";
  label.append(input);
  form.append(label, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    model.send({ kind: "token", token: input.value });
    input.value = "";
  });
  form.addEventListener("keydown", (event) => event.stopPropagation());
  el.append(form);
}
export default { render };
